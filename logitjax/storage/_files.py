"""Files that appear whole or not at all."""

import os
import uuid
from collections.abc import Callable
from typing import IO

from etils import epath


def write_atomic(
    path: str | os.PathLike[str], content: bytes | str | Callable[[IO[bytes]], object]
) -> None:
    """Writes a file so that readers see the old one or the new one, never a part of it.

    The content goes to a hidden file beside the target, which is then renamed. What a killed run
    leaves is that hidden file, which nothing reads.

    Args:
        path: The file, local or remote; its folder is made.
        content: Bytes, a text (UTF-8), or a function that writes into an open binary file, for
            what should not lie in memory twice.

    >>> import tempfile
    >>> path = epath.Path(tempfile.mkdtemp()) / "notes" / "one.txt"
    >>> write_atomic(path, "whole")
    >>> path.read_text()
    'whole'
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        if callable(content):
            with unfinished.open("wb") as file:
                content(file)
        else:
            unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in an object store, where only whole files can be written."""
    return "://" in os.fspath(path)
