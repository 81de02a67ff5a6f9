"""What ``import logitjax`` offers."""

import pathlib

import logitjax


def test_every_package_is_an_attribute():
    root = pathlib.Path(logitjax.__file__).parent
    packages = {path.parent.name for path in root.glob("*/__init__.py")} | {
        path.stem for path in root.glob("*.py") if not path.stem.startswith("_")
    }
    assert packages == set(logitjax._PACKAGES)
    for name in packages:
        assert getattr(logitjax, name).__name__ == f"logitjax.{name}"
