"""Atomic file writes."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable
from typing import IO

import fsspec.config
from etils import epath

# gcsfs keeps listings forever, including files that others wrote or removed since.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def write_atomic(
    path: str | os.PathLike[str], content: bytes | str | Callable[[IO[bytes]], object]
) -> None:
    """Write a file so that readers see the old one or the new one, never a part of it.

    The content goes to a hidden file next to the target, which is synced and then renamed; a killed
    run leaves only that. Object stores only show complete files: there the target is written.

    Args:
        path: The file, local or remote; its folder is created.
        content: Bytes, a text (UTF-8), or a function that writes into an open binary file.

    >>> import tempfile
    >>> path = epath.Path(tempfile.mkdtemp()) / "notes" / "one.txt"
    >>> write_atomic(path, "whole")
    >>> path.read_text()
    'whole'
    """
    path = epath.Path(path)
    if is_remote(path):
        if callable(content):
            # Closing an open remote file completes it, even after an error.
            with tempfile.TemporaryDirectory() as scratch:
                write_atomic(near := epath.Path(scratch) / path.name, content)
                near.copy(path, overwrite=True)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with unfinished.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # A rename may reach the disk before the bytes do: after a power loss the file would
            # have its name and be empty.
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _sync_folder(folder: epath.Path) -> None:
    """Put a rename on disk; file systems that cannot (some network ones) are left as they are."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in an object store, where only whole files can be written."""
    return "://" in os.fspath(path)
