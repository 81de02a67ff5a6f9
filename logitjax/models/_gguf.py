"""Reading GGUF files: the header at once, tensors dequantised one at a time.

``gguf.GGUFReader`` makes an array object of every token and merge, seconds and hundreds of
megabytes for a vocabulary; here the header becomes plain Python values. Block formats are the
library's.
"""

import math
import struct
from typing import Any

import numpy as np
from etils import epath

from logitjax.storage import require

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class _Header:
    """Reads values off the front of a buffer."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        piece = self.data[self.at : self.at + length]
        if len(piece) < length:
            raise struct.error("string runs past the end")
        self.at += length
        return piece.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in (_STRING, _ARRAY):
            return [self.value(inner) for _ in range(count)]
        form = f"<{count}{_SCALARS[inner]}"
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return list(values)


class GgufSource:
    """Tensors and metadata of a GGUF file."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        if not self.path.exists():
            raise ValueError(f"{self.path}: no such file")
        self._size = self.path.stat().length
        self._metadata: dict[str, Any] = {}
        self._tensors: dict[str, tuple[int, tuple[int, ...], int]] = {}
        length = 1 << 23
        with self.path.open("rb") as file:
            data = file.read(length)
            if data[:4] != b"GGUF":
                raise ValueError(f"{self.path}: not a GGUF file")
            while True:
                try:
                    self._parse(data)
                    break
                except (struct.error, KeyError, MemoryError) as error:
                    more = file.read(length)
                    if not more:
                        raise ValueError(
                            f"{self.path}: truncated or damaged GGUF file ({error})"
                        ) from None
                    data, length = data + more, 2 * length
        for name in self._tensors:
            if self._end(name) > self._size:
                raise ValueError(
                    f"{self.path}: truncated or damaged GGUF file (tensor {name!r} ends at byte "
                    f"{self._end(name)}, the file has {self._size})"
                )

    def _parse(self, data: bytes) -> None:
        header = _Header(data)
        header.at = 4
        version = header.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{self.path}: GGUF version {version} is not supported")
        tensors, entries = header.scalar("Q"), header.scalar("Q")
        self._metadata = {}
        for _ in range(entries):
            key = header.string()
            self._metadata[key] = header.value(header.scalar("I"))
        infos = {}
        for _ in range(tensors):
            name = header.string()
            dims = [header.scalar("Q") for _ in range(header.scalar("I"))]
            kind, offset = header.scalar("I"), header.scalar("Q")
            infos[name] = (kind, tuple(reversed(dims)), offset)
        alignment = self._metadata.get("general.alignment", 32)
        start = -(-header.at // alignment) * alignment
        self._tensors = {n: (kind, shape, start + at) for n, (kind, shape, at) in infos.items()}

    def _kind(self, name: str) -> Any:
        gguf = require("gguf", extra="models")
        number = self._tensors[name][0]
        try:
            return gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{self.path}: tensor {name!r} has unknown type {number}") from None

    def _row_bytes(self, name: str) -> int:
        gguf = require("gguf", extra="models")
        block, size = gguf.GGML_QUANT_SIZES[self._kind(name)]
        shape = self._tensors[name][1]
        return math.prod(shape[1:] if len(shape) > 1 else shape) // block * size

    def _rows(self, name: str) -> int:
        shape = self._tensors[name][1]
        return shape[0] if len(shape) > 1 else 1

    def _end(self, name: str) -> int:
        return self._tensors[name][2] + self._rows(name) * self._row_bytes(name)

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor in float32, or a range of its first axis; blocks never cross rows."""
        _, shape, offset = self._tensors[name]
        width = self._row_bytes(name)
        first, last, _ = rows.indices(shape[0]) if len(shape) > 1 else (0, 1, 1)
        with self.path.open("rb") as file:
            file.seek(offset + first * width)
            data = np.frombuffer(file.read((last - first) * width), np.uint8)
        kind, quants = self._kind(name), require("gguf.quants", extra="models")
        try:
            values = quants.dequantize(data.reshape(last - first, width), kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: tensor {name!r} has unsupported type {kind.name}"
            ) from None
        return values.reshape(last - first, *shape[1:]) if len(shape) > 1 else values[0][rows]

    def metadata(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(key, default)
