"""Packages that only some jobs need."""

import importlib
from typing import Any


def require(package: str, *, extra: str) -> Any:
    """Import a module of an optional package where it is used.

    Args:
        package: The module's name, such as `gguf` or `safetensors.numpy`.
        extra: The extra of logitjax that installs it.

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
