"""Atomic file writes."""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable
from typing import IO, Any

import fsspec.config
from absl import logging
from etils import epath

from logitjax.storage import _guard as guard

# gcsfs keeps listings forever, and with them files that others wrote or removed since.
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


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file with a checksum, so that `read_json` notices a changed bit."""
    record = value if isinstance(value, dict) else {"": value}
    record = {**record, guard.CHECKSUM: guard.checksum(record)}
    write_atomic(path, json.dumps(record, indent=1) + "\n")


def kept(path: epath.Path, make: Callable[[], Any] | None = None) -> Any:
    """A record of `write_json`; made and written first where none can be read (None if not)."""
    try:
        if path.exists():
            return guard.read_json(path)
    except ValueError as error:
        logging.warning("%s: creating it again", error)
    if make is None:
        return None
    write_json(path, make())
    # As a run that goes on has it.
    return guard.read_json(path)


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
