"""Reading GGUF files: the header at once, tensors dequantised some rows at a time.

`gguf.GGUFReader` makes an array object of every token and merge: seconds, hundreds of MB.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from logitjax.ops import Codes
from logitjax.storage import guard, require

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# The library holds a few copies of the data it dequantises.
_PIECE = 1 << 20
_K = "003c0000" + "01010101" + "00000000" + "01010101"
# Of types whose numbers are `scale * value + minimum`: type of values, values of a scale, and bytes
# by place that make every scale 1 and minimum 0, every value 1 and minimum 0, or every value 0.
_CODED: dict[str, tuple[str, int, dict[int, str], dict[int, str], dict[int, str] | None]] = {
    "Q8_0": ("int8", 32, {0: "003c"}, {2: "01" * 32}, None),
    "Q4_0": ("int4", 32, {0: "003c"}, {2: "99" * 16}, None),
    "Q4_1": ("uint4", 32, {0: "003c0000"}, {2: "0000" + "11" * 16}, {4: "00" * 16}),
    "Q5_0": ("int8", 32, {0: "003c"}, {2: "ff" * 4 + "11" * 16}, None),
    "Q5_1": ("int8", 32, {0: "003c0000"}, {2: "00" * 6 + "11" * 16}, {4: "00" * 20}),
    "IQ4_NL": ("int8", 32, {0: "003c"}, {2: "88" * 16}, None),
    "MXFP4": ("int8", 32, {0: "80"}, {1: "11" * 16}, None),
    "Q4_K": ("uint4", 32, {0: _K}, {2: "0000", 16: "11" * 128}, {16: "00" * 128}),
    "Q5_K": ("int8", 32, {0: _K}, {2: "0000", 16: "00" * 32 + "11" * 128}, {16: "00" * 160}),
    "Q6_K": ("int8", 16, {192: "01" * 16 + "003c"}, {0: "11" * 128 + "aa" * 64}, None),
}


class _Header:
    def __init__(self, file: guard.Reader):
        self.file = file
        self._values = 0

    def scalar(self, form: str, field: str) -> Any:
        # Always little-endian.
        content = self.file.read(struct.calcsize("<" + form), field)
        return struct.unpack("<" + form, content)[0]

    def string(self, field: str) -> str:
        length = self.scalar("Q", f"length of {field}")
        self.file.need(length, field)
        guard.whole(length, f"length of {field}", most=guard.LIMITS.header_bytes // 2)
        return self.file.read(length, field).decode("utf-8", "replace")

    def values(self, count: int, least: int, field: str) -> int:
        """A count of values of at least this many bytes each, which the file must contain."""
        self.file.need(count * least, field)
        self._values += count
        if self._values > guard.LIMITS.elements:
            raise ValueError(f"{field}: {count} values, expected {guard.LIMITS.elements} in all")
        return count

    def kind(self, field: str) -> int:
        kind = self.scalar("I", f"type of {field}")
        if kind not in _SCALARS and kind not in (_STRING, _ARRAY):
            raise ValueError(f"{field}: unknown type {kind}")
        return kind

    def value(self, field: str) -> Any:
        kind = self.kind(field)
        if kind == _STRING:
            return self.string(field)
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind], field)
        inner, count = self.kind(field), self.scalar("Q", f"length of {field}")
        if inner == _ARRAY:
            raise ValueError(f"{field}: arrays of arrays are not supported")
        if inner == _STRING:
            return [self.string(field) for _ in range(self.values(count, 8, field))]
        size = struct.calcsize(_SCALARS[inner])
        content = self.file.read(size * self.values(count, size, field), field)
        return list(struct.unpack(f"<{count}{_SCALARS[inner]}", content))


class GgufSource:
    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        if not self.path.exists():
            raise ValueError(f"{self.path}: no such file")
        guard.plain_file(self.path)
        self._metadata: dict[str, Any] = {}
        self._tensors: dict[str, tuple[int, tuple[int, ...], int]] = {}
        self._expanded: set[str] = set()
        with guard.naming(self.path, "a GGUF file"), self.path.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise ValueError(f"{self.path}: not a GGUF file")
            self._parse(guard.Reader(opened))

    def _parse(self, file: guard.Reader) -> None:
        header = _Header(file)
        version = header.scalar("I", "version")
        if version not in (2, 3):
            raise ValueError(f"{self.path}: GGUF version {version} is not supported")
        tensors, entries = header.scalar("Q", "tensors"), header.scalar("Q", "metadata")
        # A name and a type take 12 bytes, a tensor's entry 24.
        for _ in range(header.values(entries, 12, "metadata")):
            key = header.string("a name of the metadata")
            self._metadata[key] = header.value(f"metadata {key[:80]}")
            guard.whole(file.tell(), "header", most=guard.LIMITS.header_bytes)
        for _ in range(header.values(tensors, 24, "tensors")):
            name = header.string("a tensor's name")
            field = f"tensor {name[:80]!r}"
            count = guard.whole(header.scalar("I", field), f"{field}: axes", least=1, most=4)
            dims = [header.scalar("Q", field) for _ in range(count)]
            # The file lists the innermost axis first.
            shape = tuple(guard.whole(n, f"{field}: shape", least=1) for n in reversed(dims))
            kind, offset = header.scalar("I", field), header.scalar("Q", field)
            if name in self._tensors:
                raise ValueError(f"{field} occurs twice")
            self._tensors[name] = (kind, shape, guard.whole(offset, f"{field}: offset"))
        alignment = self._metadata.get("general.alignment", 32)
        alignment = guard.whole(alignment, "general.alignment", least=1, most=1 << 20)
        # Tensors begin at the next multiple after the header.
        start = -(-file.tell() // alignment) * alignment
        spans = []
        for name, (kind, shape, offset) in self._tensors.items():
            self._tensors[name] = (kind, shape, start + offset)
            end = start + offset + self._rows(name) * self._row_bytes(name)
            if end > file.size:
                raise ValueError(
                    f"{self.path}: truncated or damaged GGUF file (tensor {name!r} ends at byte "
                    f"{end}, the file has {file.size})"
                )
            spans.append((start + offset, end, name))
        guard.apart(spans)

    def _kind(self, name: str) -> Any:
        gguf = require("gguf", extra="models")
        number = self._tensors[name][0]
        try:
            return gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{self.path}: tensor {name!r} has unknown type {number}") from None

    def _block(self, name: str) -> tuple[int, int]:
        """Numbers and bytes of a block."""
        return require("gguf", extra="models").GGML_QUANT_SIZES[self._kind(name)]

    def _row_bytes(self, name: str) -> int:
        block, size = self._block(name)
        width = self._row_width(name)
        if width % block:
            raise ValueError(f"{self.path}: tensor {name!r}: rows of {width} in blocks of {block}")
        return width // block * size

    def _row_width(self, name: str) -> int:
        shape = self._tensors[name][1]
        return math.prod(shape[1:] if len(shape) > 1 else shape)

    def _rows(self, name: str) -> int:
        shape = self._tensors[name][1]
        return shape[0] if len(shape) > 1 else 1

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def read(self, name: str, rows: slice = slice(None), *, dtype: Any = None) -> np.ndarray:
        """A tensor, or a range of its first axis; float32 if `dtype` is None."""
        _, shape, _ = self._tensors[name]
        first, last, _ = rows.indices(shape[0]) if len(shape) > 1 else (0, 1, 1)
        out = guard.aligned((max(0, last - first), self._row_width(name)), dtype or np.float32)
        for span, numbers in self._numbers(name, first, len(out)):
            out[span] = numbers
        return out.reshape(last - first, *shape[1:]) if len(shape) > 1 else out[0][rows]

    def codes(self, name: str) -> Codes | None:
        """A matrix in the file's own numbers, as NumPy arrays; None if it is to be expanded."""
        kind, shape = self._kind(name).name, self.shape(name)
        if kind not in _CODED or len(shape) != 2:
            if self._block(name)[0] > 1 and kind not in self._expanded:
                logging.warning("%s: its tensors of type %s are expanded", self.path, kind)
                self._expanded.add(kind)
            return None
        bits, size, *forms = _CODED[kind]
        rows, width = shape
        # Those of types in blocks of blocks are products.
        steps = np.float16 if size == self._block(name)[0] and kind != "MXFP4" else np.float32
        out = [np.empty((rows, width), np.int8)]
        out += [np.empty((rows, width // size), steps) for _ in range(2)]
        for part, form in zip(out, forms, strict=True):
            for span, numbers in self._numbers(name, 0, rows, form) if form else ():
                part[span] = numbers[:, :: width // part.shape[1]]
        values, scales, offsets = out
        return Codes(values.astype(jnp.dtype(bits)), scales, offsets if forms[2] else None)

    def _numbers(
        self, name: str, first: int, count: int, form: Mapping[int, str] | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Some rows, a piece at a time, from blocks in which the bytes of `form` are put first."""
        # Blocks never cross rows, so any range of rows can be read separately.
        width, step = self._row_bytes(name), max(1, _PIECE // self._row_width(name))
        kind, quants = self._kind(name), require("gguf.quants", extra="models")
        with guard.naming(self.path, "a GGUF file"), self.path.open("rb") as opened:
            file = guard.Reader(opened)
            file.seek(self._tensors[name][2] + first * width)
            for begin in range(0, count, step):
                some = min(step, count - begin)
                data = file.array(np.uint8, some * width, f"tensor {name!r}")
                for start, content in (form or {}).items():
                    places = np.frombuffer(bytes.fromhex(content), np.uint8)
                    data.reshape(-1, self._block(name)[1])[:, start : start + len(places)] = places
                try:
                    numbers = quants.dequantize(data.reshape(some, width), kind)
                except NotImplementedError:
                    why = f"tensor {name!r} has unsupported type {kind.name}"
                    raise ValueError(f"{self.path}: {why}") from None
                yield slice(begin, begin + some), numbers

    def metadata(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(key, default)
