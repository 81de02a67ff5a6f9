"""Reading pickled dictionaries of numpy arrays without running what is inside.

Flax checkpoints were often written with ``pickle.dump``. As in the reader of torch files, the few
names that arrays need are stood in for, and every other is refused before it is called.
"""

import collections
import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from logitjax.storage._torch_checkpoint import DAMAGE, _bytes, _Dtype, _numpy_scalar


class _Array:
    """Stands in for an array between its creation and its contents."""

    def __init__(self, *unused: Any):
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array that does not hold plain numbers")
        order = "F" if fortran else "C"
        self.value = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> "_Array":
    """What protocol 5 calls for an array whose bytes lie in the pickle."""
    array = _Array()
    array.__setstate__((1, tuple(shape), dtype, order == "F", bytes(data)))
    return array


_CLASS = object()  # what numpy.ndarray is here: a word in an argument list


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): _CLASS,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _bytes,
    **{
        (f"numpy.{core}.multiarray", name): stand_in
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", _Array), ("scalar", _numpy_scalar))
    },
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return _ALLOWED[module, name]


def _arrays(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without contents")
        return value.value
    if isinstance(value, Mapping):
        return {key: _arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_arrays(item) for item in value)
    return value


def read_numpy_pickle(path: epath.PathLike) -> Any:
    """What a pickle of nested dictionaries, lists and numpy arrays holds.

    Args:
      path: the file.

    Returns:
      The object; arrays are read-only views of the file's bytes.

    Raises:
      ValueError: the pickle asks for anything else, or is damaged.
    """
    path = epath.Path(path)
    try:
        return _arrays(_Unpickler(io.BytesIO(path.read_bytes())).load())
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused as a pickle of arrays: {error}") from None
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read as a pickle of arrays: {error}") from None
