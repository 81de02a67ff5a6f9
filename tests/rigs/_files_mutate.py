"""Seeded damage to files: to any bytes, and to what readers understand of them."""

import contextlib
import copy
import io
import json
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from tests.rigs import _tables

Random = random.Random

_TABLE = _tables.read("hostile_values")
_SIZES: tuple[int, ...] = tuple(_TABLE["numbers"])
VALUES: tuple[Any, ...] = (*_TABLE["values"], "9" * 5000, "x" * 20_000, [0] * 20_000)


def deep(depth: int, value: Any = 0) -> Any:
    """Lists within each other."""
    for _ in range(depth):
        value = [value]
    return value


def any_bytes(data: bytes, rng: Random) -> bytes:
    """One to four edits that know nothing of the format."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        edit, size = rng.randrange(8), len(out)
        at = rng.randrange(size) if size else 0
        if edit == 0:
            for _ in range(rng.randint(1, 8)):
                if size:
                    out[rng.randrange(size)] ^= 1 << rng.randrange(8)
        elif edit == 1:
            out[at : at + rng.randint(1, 16)] = rng.randbytes(rng.randint(1, 16))
        elif edit == 2:
            del out[at:]
        elif edit == 3:
            del out[at : at + rng.randint(1, 200)]
        elif edit == 4:
            begin = rng.randrange(size) if size else 0
            out[at:at] = out[begin : begin + rng.randint(1, 400)]
        elif edit == 5:
            begin = rng.randrange(size) if size else 0
            piece = out[begin : begin + rng.randint(1, 400)]
            out[at : at + len(piece)] = piece
        else:
            number = rng.choice((*_SIZES, size, size + 1, max(0, size - 1), rng.getrandbits(16)))
            width = rng.choice((1, 2, 4, 8))
            order = "little" if edit == 6 else "big"
            out[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, order)
    return bytes(out)


def _places(value: Any, places: list[tuple[Any, Any]]) -> None:
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        places.append((value, key))
        if isinstance(value[key], dict | list):
            _places(value[key], places)


def any_json(value: Any, rng: Random) -> Any:
    """One to three values of a JSON document changed, gone, renamed or exchanged."""
    holder = [copy.deepcopy(value)]
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        _places(holder, places)
        home, key = rng.choice(places)
        edit = rng.randrange(8)
        if edit < 4:
            home[key] = copy.deepcopy(rng.choice(VALUES))
        elif edit == 4 and home is not holder:
            del home[key]
        elif edit == 5 and isinstance(home, dict):
            home[rng.choice((f"{key}.", "", "model_type", "shape", "x" * 300))] = home.pop(key)
        elif edit == 6:
            other, name = rng.choice(places)
            home[key], other[name] = copy.deepcopy((other[name], home[key]))
        elif isinstance(home[key], int | float):
            home[key] = rng.choice((home[key] + 1, home[key] * 2, -home[key], home[key] * 10**6))
        else:
            home[key] = deep(rng.choice((1, 60, 70, 200)), home[key])
    return holder[0]


def json_text(value: Any, rng: Random) -> bytes:
    """A changed document as bytes, which are sometimes no JSON any more."""
    text = json.dumps(any_json(value, rng)).encode()
    if rng.random() < 0.1:
        text = b'{"a": 1, ' + text[1:]
    return any_bytes(text, rng) if rng.random() < 0.25 else text


def safetensors(data: bytes, rng: Random) -> bytes:
    """A changed header before the same tensors, with its length or another one."""
    length = int.from_bytes(data[:8], "little")
    header = json_text(json.loads(data[8 : 8 + length]), rng)
    claimed = len(header) if rng.random() < 0.9 else rng.choice(_SIZES)
    return claimed.to_bytes(8, "little") + header + data[8 + length :]


# Steps of pickles between spaces, which none of them has.
_STEPS = (
    b"] } ) ( N 0 2 a e s u t \x85 \x86 \x87 R b \x81 Q K\x01 \x88 q\x00 h\x00 h\x01 \x94 \x8f \x90"
    b" \x91 r\xff\xff\xff\x7f X\xff\xff\xff\xff \x96\xff\xff\xff\xff\xff\xff\xff\xff l d"
    b" \x8a\x08\xff\xff\xff\xff\xff\xff\xff\xff cos\nsystem\n cbuiltins\neval\n"
    b" ctorch\nFloatStorage\n ccollections\nOrderedDict\n I999999999999\n i__main__\nx\n P1\n"
    b" \x95\0\0\0\0\0\0\0\0"
).split(b" ")


def a_pickle(data: bytes, rng: Random) -> bytes:
    """Steps of the first pickle taken out, doubled, exchanged, or put between others."""
    ends: list[int] = []
    with contextlib.suppress(ValueError):
        ends = [end for _, _, end in pickletools.genops(data) if end is not None]
    if len(ends) < 3 or rng.random() < 0.2:
        return any_bytes(data, rng)
    steps = [data[a:b] for a, b in zip(ends, [*ends[1:], ends[-1] + 1])]
    for _ in range(rng.randint(1, 4)):
        at, edit = rng.randrange(len(steps)), rng.randrange(5)
        if edit == 0:
            steps[at:at] = [rng.choice(_STEPS) * rng.choice((1, 1, 1, 50, 2000))]
        elif edit == 1:
            del steps[at : at + rng.randint(1, 3)]
        elif edit == 2:
            other = rng.randrange(len(steps))
            steps[at], steps[other] = steps[other], steps[at]
        elif edit == 3:
            begin = rng.randrange(len(steps))
            steps[at:at] = steps[begin : begin + rng.randint(1, 30)]
        else:
            steps[at] = any_bytes(steps[at], rng)
        if not steps:
            return b""
    return b"".join(steps) + data[ends[-1] + 1 :]


def a_zip(data: bytes, rng: Random, inner: Callable[[str, bytes, Random], bytes]) -> bytes:
    """Members changed inside and packed again, so that their checksums are right."""
    if rng.random() < 0.4:
        return any_bytes(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = old.read(name)
            if name == chosen:
                if rng.random() < 0.05:
                    continue
                content = inner(name, content, rng)
                if rng.random() < 0.05:
                    name = rng.choice((f"../{name}", name + "x", "archive/data.pkl", ""))
            how = zipfile.ZIP_DEFLATED if rng.random() < 0.2 else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(name), content, how)
    return any_bytes(out.getvalue(), rng) if rng.random() < 0.1 else out.getvalue()


def npy(name: str, data: bytes, rng: Random) -> bytes:
    """A changed header of an array."""
    del name
    if rng.random() < 0.3 or data[:6] != b"\x93NUMPY":
        return any_bytes(data, rng)
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length].decode("latin1").strip()
    shape = rng.choice(("(1000000, 1000000)", "(-1,)", "()", "(3.5,)", "(0,)", "(2,)*9", "None"))
    kind = rng.choice(("|O", "<f8", "<f4", "|V8", "<U9999", "[('a', '<f4')]", "<M8[s]", "|S0", "x"))
    if rng.random() < 0.5:
        header = header.partition("'shape': ")[0] + f"'shape': {shape}, }}"
    if rng.random() < 0.5:
        header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': (3, 4), }}"
    if rng.random() < 0.1:
        header = "(" * rng.choice((10, 200, 9000)) + header
    text = header.encode("latin1", "replace") + b"\n"
    return data[:8] + len(text).to_bytes(2, "little") + text + data[10 + length :]


def png(data: bytes, rng: Random) -> bytes:
    """Chunks changed, with checksums that are right again."""
    if data[:4] != b"\x89PNG" or rng.random() < 0.3:
        return any_bytes(data, rng)
    chunks, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    number = rng.randrange(len(chunks))
    kind, content = chunks[number]
    if kind == b"IHDR" and rng.random() < 0.8:
        sides = [rng.choice((0, 1, 7, 3000, 65_535, 1 << 20, (1 << 31) - 1)) for _ in "hw"]
        tail = rng.choice((content[8:], rng.randbytes(5), b"\x08\x06\0\0\0", b"\x10\0\0\0\0"))
        content = struct.pack(">II", *sides) + tail
    else:
        content = any_bytes(content, rng)
    chunks[number] = (kind, content)
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    parts = [data[:8]]
    for kind, content in chunks:
        crc = zlib.crc32(kind + content).to_bytes(4, "big")
        parts += [len(content).to_bytes(4, "big"), kind, content, crc]
    return b"".join(parts)
