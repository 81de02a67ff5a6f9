"""Parts of a release: one version, files that newcomers and indices look for."""

import configparser
import importlib.util
import pathlib
import subprocess

import pytest
import yaml

import logitjax

ROOT = pathlib.Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release)


def test_the_version_has_one_place_and_the_others_agree():
    assert release.version() == logitjax.__version__
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == "attr: logitjax.__version__"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == logitjax.__version__
    assert citation["license"] == config["metadata"]["license"]


def test_placeholders_are_filled_and_lines_that_wait_for_them_uncommented():
    text = "# url = @REPOSITORY@\n# why: see @CONTACT@\n# other\nwrite to @CONTACT@.\n"
    values = {"@REPOSITORY@": "https://a.test/b", "@CONTACT@": "c@a.test"}
    assert release.filled(text, values) == (
        "url = https://a.test/b\nwhy: see c@a.test\n# other\nwrite to c@a.test.\n"
    )
    assert set(values) == set(release.PLACEHOLDERS)


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.name)
def test_workflows_and_templates_parse_and_run_what_exists(path):
    workflow = yaml.safe_load(path.read_text())
    steps = [s for job in workflow.get("jobs", {}).values() for s in job["steps"]]
    makefile = (ROOT / "Makefile").read_text()
    for step in steps:
        words = step.get("run", "").split()
        if words[:1] == ["make"]:
            assert f"\n{words[1]}:" in makefile, step
        for word in words:
            if word.startswith((".ci/", "tests/")):
                assert (ROOT / word).exists(), step


def test_what_the_sdist_needs_is_known_to_git():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    names = "README.md CHANGELOG.md CITATION.cff SECURITY.md CODE_OF_CONDUCT.md CONTRIBUTING.md"
    assert set(names.split()) | {"LICENSE", "logitjax/py.typed"} <= set(listed)
