"""NumPy's own files, checked against their sizes before they are read."""

import io
import os
from typing import Any

import numpy as np
from etils import epath

from logitjax.storage import _guard as guard


def read_npz(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, by name.

    Raises:
        ValueError: there is no such file, or it is not one, holds objects, or claims more than it
            has; names the file.
    """
    path = epath.Path(path)
    with guard.naming(path, "an .npz file"):
        guard.plain_file(path)
        with path.open("rb") as file:
            archive = guard.open_zip(file)
            found = {}
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in found:
                    raise ValueError(f"array {name!r} is there twice")
                found[name] = _array(guard.member_array(archive, member, np.uint8), name)
            return found


def read_npy(path: epath.PathLike, *, mapped: bool = False) -> np.ndarray:
    """The array of an ``.npy`` file.

    Args:
        path: the file.
        mapped: whether to leave it on the disk, where the file system allows that.

    Raises:
        ValueError: there is no such file, or it is not one, holds objects, or claims more than it
            has; names the file.
    """
    path = epath.Path(path)
    with guard.naming(path, "an .npy file"):
        guard.plain_file(path)
        with path.open("rb") as opened:
            dtype, shape, fortran = _header(opened, "array")
            file = guard.Reader(opened)
            guard.fits(shape, dtype.itemsize, file.left, "array")
            order = "F" if fortran else "C"
            if mapped and "://" not in os.fspath(path) and file.left:
                return np.memmap(os.fspath(path), dtype, "r", file.tell(), shape, order)
            count = file.left // dtype.itemsize if dtype.itemsize else 0
            return file.array(dtype, count, "array").reshape(shape, order=order)


def _array(content: np.ndarray, name: str) -> np.ndarray:
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
    if dtype.kind not in "biufcSUMmV" or dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"{field}: expected plain numbers, got {str(dtype)[:40]}")
    return dtype, guard.shape_of(shape, f"{field}: shape"), fortran
