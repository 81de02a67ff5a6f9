"""Reading safetensors byte range by byte range.

The safetensors library maps whole files, and mapped pages count as host memory until they are
dropped; reading just the rows a device needs keeps the peak at the model plus one buffer.
"""

import json
import math

import ml_dtypes
import numpy as np
from etils import epath

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


class SafetensorsSource:
    """The tensors of one directory: ``model.safetensors``, or the shards its index names."""

    def __init__(self, directory: epath.PathLike):
        self.directory = epath.Path(directory)
        self._tensors: dict[str, tuple[epath.Path, str, tuple[int, ...], int]] = {}
        for path in self._files():
            self._read_header(path)

    def _files(self) -> list[epath.Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [self.directory / name for name in names]
            missing = [f.name for f in files if not f.exists()]
            if missing:
                raise ValueError(f"{index}: shard {missing[0]} is not there")
            return files
        single = self.directory / "model.safetensors"
        if single.exists():
            return [single]
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self.directory}: no .safetensors file there")
        return files

    def _read_header(self, path: epath.Path) -> None:
        size = path.stat().length
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or 8 + length > size:
                raise ValueError(f"{path}: truncated or not a safetensors file ({size} bytes)")
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise ValueError(f"{path}: unreadable safetensors header ({error})") from None
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise ValueError(
                    f"{path}: truncated, tensor {name!r} ends at byte {8 + length + end} "
                    f"but the file has {size}"
                )
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{path}: tensor {name!r} has unsupported dtype {entry['dtype']}")
            shape = tuple(entry["shape"])
            itemsize = np.dtype(_DTYPES[entry["dtype"]]).itemsize
            if end - begin != math.prod(shape) * itemsize:
                raise ValueError(
                    f"{path}: tensor {name!r} takes {end - begin} bytes, not its shape {shape}"
                )
            self._tensors[name] = (path, entry["dtype"], shape, 8 + length + begin)

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][2]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or a range of its first axis."""
        path, dtype_name, shape, offset = self._tensors[name]
        dtype = np.dtype(_DTYPES[dtype_name])
        first, last, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
        stride = math.prod(shape[1:]) * dtype.itemsize
        out = np.empty((last - first) * stride, np.uint8)
        with path.open("rb") as file:
            file.seek(offset + first * stride)
            view, done = memoryview(out.data), 0
            while done < len(view):
                # Bounded pieces: some file systems hand back a copy of what was asked for.
                piece = file.read(min(len(view) - done, 1 << 24))
                if not piece:
                    raise ValueError(f"{path}: truncated inside tensor {name!r}")
                view[done : done + len(piece)] = piece
                done += len(piece)
        return out.view(dtype).reshape((last - first, *shape[1:]) if shape else ())
