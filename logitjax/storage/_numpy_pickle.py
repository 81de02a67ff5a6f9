"""Reading pickled dictionaries of numpy arrays without running what is inside.

Flax checkpoints were often written with ``pickle.dump``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from logitjax.storage import _guard as guard
from logitjax.storage._pickles import ALLOWED, Dtype, Machine, StandIn, plain


class _Array:
    """Stands in for an array between its creation and its contents."""

    def __init__(self, *unused: Any):
        self.value: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array of an unknown form")
        _, shape, dtype, fortran, data = state
        if isinstance(data, str):
            data = data.encode("latin1")  # as Python 2 wrote it
        if not isinstance(dtype, Dtype) or not isinstance(data, bytes | bytearray):
            raise ValueError("an array that does not hold plain numbers")
        shape = guard.shape_of(shape, "an array's shape")
        guard.fits(shape, dtype.dtype.itemsize, len(data), "an array")
        order = "F" if fortran else "C"
        self.value = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """What protocol 5 calls for an array whose bytes lie in the pickle."""
    array = _Array()
    array.set_state((1, shape, dtype, order == "F", data))
    return array


_ALLOWED: Mapping[tuple[str, str], Any] = {
    **ALLOWED,
    ("numpy", "ndarray"): object(),  # a word in an argument list
    **{(f"numpy.{core}.multiarray", "_reconstruct"): StandIn(_Array) for core in ("core", "_core")},
    **{
        (f"numpy.{core}.numeric", "_frombuffer"): StandIn(_from_buffer)
        for core in ("core", "_core")
    },
}


def _array(value: Any) -> Any:
    if not isinstance(value, _Array):
        return value
    if value.value is None:
        raise ValueError("an array without contents")
    return value.value


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
    with guard.naming(path, "a pickle of arrays"):
        guard.plain_file(path)
        with path.open("rb") as file:
            names = Machine(guard.Reader(file), lambda module, name: _ALLOWED.get((module, name)))
            return plain(names.load(), _array)
