"""NumPy's files and pickles of its arrays, checked against their sizes before they are read."""

import io
import os
from typing import Any

import numpy as np
from etils import epath

from logitjax.storage import _guard as guard
from logitjax.storage._pickles import ALLOWED, Dtype, Machine, StandIn, plain


def read_npz(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, by name; ValueError names a damaged file."""
    with guard.opened(path, "an .npz file") as file:
        archive = guard.open_zip(file)
        npz = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in npz:
                raise ValueError(f"array {name!r} occurs twice")
            npz[name] = _array(guard.member_array(archive, member, np.uint8), name)
        return npz


def read_npy(path: epath.PathLike, *, mapped: bool = False) -> np.ndarray:
    """The array of an ``.npy`` file; `mapped` leaves it on disk if possible."""
    with guard.opened(path, "an .npy file") as opened:
        dtype, shape, fortran = _header(opened, "array")
        file = guard.Reader(opened)
        guard.fits(shape, dtype.itemsize, file.left, "array")
        order = "F" if fortran else "C"
        # An empty file has nothing to map, which mmap treats as an error.
        if mapped and "://" not in os.fspath(path) and file.left:
            return np.memmap(os.fspath(path), dtype, "r", file.tell(), shape, order)
        count = file.left // dtype.itemsize if dtype.itemsize else 0
        return file.array(dtype, count, "array").reshape(shape, order=order)


def _array(content: np.ndarray, name: str) -> np.ndarray:
    # More than any header.
    file = io.BytesIO(content[: 1 << 16].tobytes())
    dtype, shape, fortran = _header(file, f"array {name!r}")
    content = content[file.tell() :]
    guard.fits(shape, dtype.itemsize, len(content), f"array {name!r}")
    if content.ctypes.data % max(1, dtype.alignment):
        content = content.copy()
    return content.view(dtype).reshape(shape, order="F" if fortran else "C")


def _header(file: Any, field: str) -> tuple[np.dtype, tuple[int, ...], bool]:
    form = np.lib.format
    version = form.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{field}: version {version} is not supported")
    read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
    shape, fortran, dtype = read(file)
    # Objects would be pickles, which run code.
    if dtype.kind not in "biufcSUMmV" or dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"{field}: expected plain numbers, got {str(dtype)[:40]}")
    return dtype, guard.shape_of(shape, f"{field}: shape"), fortran


class _Array:
    """Stands in for an array between its creation and its contents."""

    def __init__(self, *unused: Any):
        self.value: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array of an unknown form")
        _, shape, dtype, fortran, data = state
        if isinstance(data, str):
            # As written by Python 2.
            data = data.encode("latin1")
        if not isinstance(dtype, Dtype) or not isinstance(data, bytes | bytearray):
            raise ValueError("an array that does not hold plain numbers")
        shape = guard.shape_of(shape, "an array's shape")
        guard.fits(shape, dtype.dtype.itemsize, len(data), "an array")
        order = "F" if fortran else "C"
        self.value = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """Rebuild an array whose bytes are in the pickle, as in protocol 5."""
    array = _Array()
    array.set_state((1, shape, dtype, order == "F", data))
    return array


_ALLOWED: dict[tuple[str, str], Any] = {
    **ALLOWED,
    # A word in an argument list.
    ("numpy", "ndarray"): object(),
}
# For NumPy 1 and 2.
for _core in ("core", "_core"):
    _ALLOWED[f"numpy.{_core}.multiarray", "_reconstruct"] = StandIn(_Array)
    _ALLOWED[f"numpy.{_core}.numeric", "_frombuffer"] = StandIn(_from_buffer)


def _filled(value: Any) -> Any:
    if not isinstance(value, _Array):
        return value
    if value.value is None:
        raise ValueError("an array without contents")
    return value.value


def read_numpy_pickle(path: epath.PathLike) -> Any:
    """Read a pickle of dictionaries, lists and numpy arrays (read-only), as in old Flax."""
    with guard.opened(path, "a pickle of arrays") as file:
        machine = Machine(guard.Reader(file), lambda module, name: _ALLOWED.get((module, name)))
        return plain(machine.load(), _filled)
