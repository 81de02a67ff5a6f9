"""A digest of anything that determines a result: values, arrays, files."""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath


def digest(*values: Any, length: int = 64, sample: int | None = None) -> str:
    """A sha256 of values, the same in every process and run.

    Two values get the same digest if they are equal and of the same kind; a list and a tuple, and a
    dataclass and the dictionary of its fields, are the same kind. Mappings have no order.

    Args:
        *values: None, numbers, texts, bytes, arrays (NumPy or JAX, random keys among them), paths,
            and lists, tuples, mappings and dataclasses of these. A path (`os.PathLike`, not a text)
            stands for the bytes of the file.
        length: Number of digits of the result; 12 are enough for the name of a folder.
        sample: Use only the shape, the type and about this many evenly spaced numbers of each
            array, for arrays of gigabytes. Training changes all, so models differ.

    Returns:
        `length` hexadecimal digits.

    Raises:
        TypeError: A value of another kind, whose `repr` may change.

    >>> digest({"k": 4, "data": "a"}) == digest({"data": "a", "k": 4})
    True
    >>> digest(np.arange(3)) == digest(np.arange(4))
    False
    """
    state = hashlib.sha256()
    _update(state, values, sample)
    return state.hexdigest()[:length]


def _update(state: Any, value: Any, sample: int | None) -> None:
    # Kind and length first, so that no two sequences of values give the same bytes.
    # Users of jax arrays have imported it; reading files does not need it.
    jax = sys.modules.get("jax")
    if jax and isinstance(value, jax.Array):
        is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
        value = jax.random.key_data(value) if is_key else value
    if isinstance(value, np.generic):
        # np.int64(3) is 3.
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        kind, content = type(value).__name__, repr(value).encode()
        state.update(f"{kind}:{len(content)}:".encode() + content)
    elif isinstance(value, bytes):
        state.update(f"bytes:{len(value)}:".encode() + value)
    elif isinstance(value, np.ndarray) or (jax and isinstance(value, jax.Array)):
        state.update(f"array:{value.dtype}:{value.shape}:".encode())
        state.update(np.ascontiguousarray(_thinned(value, sample)).tobytes())
    elif isinstance(value, Mapping):
        state.update(f"mapping:{len(value)}:".encode())
        for key in sorted(value, key=repr):
            _update(state, key, sample)
            _update(state, value[key], sample)
    elif isinstance(value, list | tuple):
        state.update(f"list:{len(value)}:".encode())
        for item in value:
            _update(state, item, sample)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        _update(state, fields, sample)
    elif isinstance(value, os.PathLike):
        _update(state, hashlib.sha256(epath.Path(value).read_bytes()).digest(), sample)
    else:
        raise TypeError(
            "digest: expected numbers, texts, arrays, paths, or lists, mappings and dataclasses of "
            f"these, got {type(value).__name__}"
        )


def _thinned(array: Any, sample: int | None) -> np.ndarray:
    if sample is None:
        return np.asarray(array)
    # Along the first axis, then the others: flattening would copy a sharded array.
    rows = array[:: max(1, array.shape[0] // 64)] if array.ndim else array
    flat = np.asarray(rows).reshape(-1)
    return flat[:: max(1, flat.size // sample)]
