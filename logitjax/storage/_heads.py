"""A trained head as two files: its description as JSON, and its arrays."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from logitjax.storage._files import write_atomic, write_json
from logitjax.storage._guard import read_json
from logitjax.storage._require import require
from logitjax.storage._safetensors import SafetensorsSource


def write_head(
    directory: str | os.PathLike[str], record: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write ``head.safetensors`` of contiguous arrays, and ``head.json``, atomically."""
    root = epath.Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    # In memory, because a head is small next to its model and `save_file` has no remote path.
    content = require("safetensors.numpy", extra="models").save(dict(tensors))
    # Without it there is no head, so that two heads are never mixed.
    (root / "head.json").unlink(missing_ok=True)
    write_atomic(root / "head.safetensors", lambda file: file.write(content))
    write_json(root / "head.json", {**record, "sha256": hashlib.sha256(content).hexdigest()})


def read_head(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `write_head` wrote: the record and the arrays.

    Raises:
        FileNotFoundError: There is no head in the directory.
        ValueError: A file is damaged; the message names it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_head(directory, {"kind": "mine"}, {"kernel": np.ones((2, 3), np.float32)})
    ...     record, tensors = read_head(directory)
    >>> record, tensors["kernel"].shape
    ({'kind': 'mine'}, (2, 3))
    """
    root = epath.Path(directory)
    if not (root / "head.json").exists():
        raise FileNotFoundError(f"no head in {root} (it has no head.json)")
    record, path = read_json(root / "head.json", form=dict), root / "head.safetensors"
    source = SafetensorsSource(path)
    # Heads of before there were digests are read.
    if record.pop("sha256", None) not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
        raise ValueError(f"{path}: damaged, it is not what head.json was written for")
    return record, {name: source.read(name) for name in source.names()}
