"""Optional packages: a line that says what to install."""

import configparser
import pathlib
import re

import pytest

from logitjax import storage

ROOT = pathlib.Path(__file__).parents[2]


def test_a_missing_package_names_its_extra():
    with pytest.raises(ImportError) as error:
        storage.require("no_such_package.part", extra="models")
    assert str(error.value).splitlines() == [
        "package no_such_package is not installed: pip install 'logitjax[models]'"
    ]
    assert storage.require("json.decoder", extra="models").JSONDecoder


def test_a_package_whose_file_is_wanted_is_named():
    options = {"what": "digits", "install": "no-such-package==1.0"}
    with pytest.raises(ValueError, match=r"digits: .*pip install --no-deps no-such-package==1\.0"):
        storage.package_file("no_such_package", "*.csv", **options)


def test_every_extra_that_an_error_names_has_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    installed_as = {"PIL": "pillow", "rouge_score": "rouge-score"}
    count = 0
    for path in (ROOT / "logitjax").rglob("*.py"):
        for package, extra in re.findall(r'require\("([\w.]+)", extra="(\w+)"\)', path.read_text()):
            if package.startswith("no_such"):
                continue
            name = package.partition(".")[0]
            assert installed_as.get(name, name) in extras[extra], (path, package)
            count += 1
    assert count > 10
