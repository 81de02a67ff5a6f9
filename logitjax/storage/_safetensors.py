"""Reading safetensors by byte ranges: pages of a mapped file would count as host memory."""

import math
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from logitjax.storage import _guard as guard

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
# Block size of float8 weights with a common scale, a factor in spite of its name.
_BLOCK, _SCALE = 128, "_scale_inv"
# Number of values held in both types at a time.
_PIECE = 1 << 20


class SafetensorsSource:
    """The tensors of a file, or of a directory: ``model.safetensors``, or its index's files."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self._tensors: dict[str, tuple[epath.Path, str, tuple[int, ...], int]] = {}
        for file in self._files() if self.path.is_dir() else [self.path]:
            with guard.naming(file, "safetensors"):
                self._read_header(file)

    def _files(self) -> list[epath.Path]:
        # In the order of transformers: an index may be left over from an earlier model.
        single = self.path / "model.safetensors"
        if single.exists():
            return [single]
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            shards = guard.read_json(index, form=dict).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{index}: weight_map: expected tensors and their files")
            with guard.naming(index):
                names = {name for name in shards.values() if isinstance(name, str)}
                if len(names) < len(set(map(str, shards.values()))):
                    raise ValueError("weight_map: expected files' names")
                guard.whole(len(names), "weight_map: files", most=guard.LIMITS.shards)
                files = [guard.inside(self.path, name, "weight_map") for name in sorted(names)]
            missing = [f.name for f in files if not f.exists()]
            if missing:
                raise ValueError(f"{index}: shard {missing[0]!r} is not there")
            return files
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self.path}: no .safetensors file there")
        return files

    def _read_header(self, path: epath.Path) -> None:
        guard.plain_file(path)
        with path.open("rb") as opened:
            file = guard.Reader(opened)
            length = int.from_bytes(file.read(8, "the header's length"), "little")
            guard.whole(length, "header", most=guard.LIMITS.header_bytes // 2)
            content = file.read(length, "the header")
            size = file.left
        try:
            header = guard.parse_json(content)
        except ValueError as error:
            text = guard.one_line(error)
            raise ValueError(f"{path}: unreadable safetensors header ({text})") from None
        if not isinstance(header, dict):
            raise ValueError(f"{path}: header: expected an object, got {type(header).__name__}")
        # Text, not a tensor.
        header.pop("__metadata__", None)
        spans = []
        for name, entry in header.items():
            dtype, shape, begin, end = _checked(name, entry)
            if end > size:
                raise ValueError(
                    f"{path}: truncated, tensor {name!r} ends at byte {8 + length + end} "
                    f"but the file has {8 + length + size}"
                )
            guard.fits(shape, np.dtype(_DTYPES[dtype]).itemsize, end - begin, f"tensor {name!r}")
            if name in self._tensors:
                raise ValueError(f"{path}: tensor {name!r} is in {self._tensors[name][0]} too")
            spans.append((begin, end, name))
            self._tensors[name] = (path, dtype, shape, 8 + length + begin)
        guard.apart(spans)

    def names(self) -> set[str]:
        return self._tensors.keys() - {name + _SCALE for name in self._tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][2]

    def read(self, name: str, rows: slice = slice(None), *, dtype: Any = None) -> np.ndarray:
        """A tensor, or a range of its first axis, in pieces of `dtype` or of the file's own type.

        Tensors with scales of blocks, as DeepSeek stores float8, are multiplied by them in float32.
        """
        if name + _SCALE not in self._tensors:
            return self._stored(name, rows, dtype)
        shape, scales = self.shape(name), self._stored(name + _SCALE, dtype=np.float32)
        if scales.shape != tuple(-(-size // _BLOCK) for size in shape) or len(shape) != 2:
            raise ValueError(
                f"{self.path}: tensor {name + _SCALE!r} has shape {scales.shape}, expected one "
                f"scale for {_BLOCK} rows and columns of {shape}"
            )
        values = self._stored(name, rows, np.float32)
        of_rows = scales[np.arange(shape[0])[rows] // _BLOCK]
        values *= np.repeat(of_rows, _BLOCK, axis=1)[:, : shape[1]]
        return values.astype(dtype or np.float32, copy=False)

    def _stored(self, name: str, rows: slice = slice(None), dtype: Any = None) -> np.ndarray:
        path, dtype_name, shape, offset = self._tensors[name]
        stored = np.dtype(_DTYPES[dtype_name])
        dtype = np.dtype(dtype or stored)
        first, last, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
        stride = math.prod(shape[1:])
        # No bytes to seek.
        if not math.prod(shape):
            return np.empty((max(0, last - first), *shape[1:]), dtype)
        with guard.naming(path, "safetensors"), path.open("rb") as opened:
            file = guard.Reader(opened)
            file.seek(offset + first * stride * stored.itemsize)
            count, field = max(0, last - first) * stride, f"tensor {name!r}"
            if dtype == stored:
                out = file.array(stored, count, field)
            else:
                out = guard.aligned(count, dtype)
                for begin in range(0, count, _PIECE):
                    end = min(begin + _PIECE, count)
                    out[begin:end] = file.array(stored, end - begin, field)
        return out.reshape((last - first, *shape[1:]) if shape else ())


def _checked(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape and span of a tensor as stated in the header."""
    field = f"tensor {name!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{field}: expected dtype, shape and data_offsets")
    dtype, offsets = entry.get("dtype"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{field} has unsupported dtype {str(dtype)[:40]}")
    shape = guard.shape_of(entry.get("shape"), f"{field}: shape")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"{field}: data_offsets: expected two numbers")
    begin, end = (guard.whole(location, f"{field}: data_offsets") for location in offsets)
    if begin > end:
        raise ValueError(f"{field}: data_offsets: {begin} is behind {end}")
    return dtype, shape, begin, end
