"""Limits on what a file may demand of its reader, checked before anything is allocated."""

import contextlib
import dataclasses
import json
import math
import operator
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from etils import epath


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a file may demand besides its tensors: in total under 200 MB and ten seconds.

    Models with vocabularies of half a million tokens stay within each limit.

    Attributes:
        header_bytes: The header of a safetensors or GGUF file.
        json_bytes: A JSON file.
        tokenizer_bytes: A `tokenizer.json`, which a library reads.
        depth: Nesting of lists and objects.
        elements: Values of a JSON text, of a GGUF header, or copied by a pickle.
        opcodes: Steps of a pickle.
        pickle_bytes: The pickle inside a zip archive, without its tensors.
        members: Files in a zip archive.
        shards: Files in an index of safetensors.
        expansion: Factor by which compressed data may grow, beyond `free_expansion` bytes.
        free_expansion: Bytes to which compressed data may always grow.
        layers: Layers of a model.
        width: Any other size in a model's configuration.
        pixels: Pixels of a picture.
        template_bytes: The source of a chat template.
        text: Characters that a chat template may output, plus 64 times its input.
        seconds: Processor time that a chat template may take.
    """

    header_bytes: int = 1 << 26
    json_bytes: int = 1 << 25
    tokenizer_bytes: int = 1 << 27
    depth: int = 64
    elements: int = 2_000_000
    opcodes: int = 200_000
    pickle_bytes: int = 1 << 25
    members: int = 100_000
    shards: int = 4096
    expansion: int = 16
    free_expansion: int = 1 << 26
    layers: int = 10_000
    width: int = 1 << 24
    pixels: int = 50_000_000
    template_bytes: int = 1 << 18
    text: int = 1 << 25
    seconds: float = 5.0


LIMITS = Limits()
#: The name in a JSON object of the checksum of all else in it, which `write_json` adds.
CHECKSUM = "crc32 of the rest"
# Brackets inside count for nothing.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def one_line(error: BaseException) -> str:
    """Shorten an exception's message to one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    return text if len(text) <= 300 else text[:300] + "..."


@contextlib.contextmanager
def naming(path: object, kind: str = "") -> Iterator[None]:
    """Turn a reader's exceptions into a `ValueError` that names the file and its `kind`."""
    try:
        yield
    except FileNotFoundError:
        raise
    # Corrupt bytes can raise any exception: from struct, zipfile, PIL, numpy, recursion.
    except BaseException as error:
        # A panic of a Rust library is no `Exception`; nor is an interrupt, which propagates.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = f"cannot be read as {kind}" if kind else "damaged"
        text = one_line(error)
        if isinstance(error, ValueError) and text.startswith(str(path)):
            raise ValueError(text) from None
        raise ValueError(f"{path}: {what} ({text})") from None


@contextlib.contextmanager
def opened(path: epath.PathLike, kind: str) -> Iterator[IO[bytes]]:
    """Open a file that is no device or pipe, with errors as from `naming`."""
    path = epath.Path(path)
    with naming(path, kind):
        plain_file(path)
        with path.open("rb") as file:
            yield file


def whole(value: Any, field: str, *, least: int = 0, most: int = 1 << 62) -> int:
    """Check an integer stated by a file, from `least` to `most`; ValueError names the field."""
    # Some programs write 1.0 for 1.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # Not by `isinstance`, for which True is an integer.
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"{field}: expected a whole number from {least} to {most}, got {short(value)}"
        )
    return value


def shape_of(value: Any, field: str) -> tuple[int, ...]:
    """Check a shape stated by a file: at most 32 sizes that are not negative."""
    # The maximum of numpy 1.
    if not isinstance(value, list | tuple) or len(value) > 32:
        raise ValueError(f"{field}: expected at most 32 sizes, got {short(value)}")
    shape = tuple(whole(size, field) for size in value)
    # Numpy counts even if a size is zero.
    whole(math.prod(size or 1 for size in shape), field, most=1 << 58)
    return shape


def fits(shape: tuple[int, ...], itemsize: int, have: int, field: str) -> None:
    """Raise unless an array of this shape takes exactly this many bytes."""
    # Exact: numpy's product would wrap.
    if math.prod(shape) * itemsize != have:
        raise ValueError(f"{field}: {have} bytes, which is not its shape {short(shape)}")


def apart(spans: Iterable[tuple[int, int, str]]) -> None:
    """Raise if two spans `(begin, end, name)` of a file overlap: one byte, one tensor."""
    last, before = 0, ""
    for begin, end, name in sorted(spans):
        if begin < last and end > begin:
            raise ValueError(f"tensor {name!r} overlaps tensor {before!r}")
        if end > begin:
            last, before = end, name


def inside(directory: epath.PathLike, name: Any, field: str) -> epath.Path:
    """A file of a directory that is named by another file in it."""
    root = epath.Path(directory)
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else [".."]
    # On Windows "C:" leaves the folder; in C a NUL ends a path.
    if ".." in parts or not parts[0] or ":" in parts[0] or "\0" in str(name) or parts == ["."]:
        raise ValueError(f"{field}: expected a file's name in {root}, got {short(name)}")
    path = root / name
    if "://" not in os.fspath(path) and path.exists():
        # The Hugging Face cache links from snapshots/REVISION to the blobs directory.
        real, home = os.path.realpath(path), os.path.realpath(root)
        homes = [home]
        if os.path.basename(os.path.dirname(home)) == "snapshots":
            homes.append(os.path.join(os.path.dirname(os.path.dirname(home)), "blobs"))
        if not any(real.startswith(location + os.sep) for location in homes):
            raise ValueError(f"{field}: {short(name)} links to a file outside of {root}")
        plain_file(path)
    return path


def plain_file(path: epath.PathLike) -> None:
    """Raise if a path is a device or a pipe, which could be read forever."""
    if "://" not in os.fspath(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: expected a file")


def read_bytes(path: epath.PathLike, *, most: int) -> bytes:
    """The bytes of a file of at most this size; ValueError names it."""
    path = epath.Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    plain_file(path)
    with path.open("rb") as file:
        # One more byte shows whether there are more.
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: expected at most {most} bytes")
    return content


def read_text(path: epath.PathLike, *, most: int) -> str:
    """The UTF-8 text of a file of at most this size; ValueError names it."""
    with naming(path, "text in UTF-8"):
        return read_bytes(path, most=most).decode()


def parse_json(content: bytes) -> Any:
    """Parse JSON unless it is nested too deeply or has too many values."""
    opened = content.count(b"[") + content.count(b"{")
    # Fast, and never too few: brackets and commas in strings are counted too.
    if opened > LIMITS.depth or opened + content.count(b",") > LIMITS.elements:
        bare = np.frombuffer(_STRING.sub(b"", content), np.uint8)
        opens, closes = np.isin(bare, list(b"[{")), np.isin(bare, list(b"]}"))
        stored = int(opens.sum()) + int((bare == ord(",")).sum())
        if stored > LIMITS.elements:
            raise ValueError(f"expected at most {LIMITS.elements} values, got about {stored}")
        steps = opens.astype(np.int8) - closes.astype(np.int8)
        if len(steps) and (depth := int(np.cumsum(steps, dtype=np.int32).max())) > LIMITS.depth:
            raise ValueError(f"nested {depth} deep, expected at most {LIMITS.depth}")
    try:
        return json.loads(content.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: str | os.PathLike[str], *, form: type | tuple[type, ...] = object) -> Any:
    """Read a JSON file whose top level is a `form`.

    Raises:
        ValueError: No such file, not JSON, beyond `LIMITS`, of another form, or of other values
            than its checksum says, where `write_json` wrote it; names the file.
    """
    content = read_bytes(path, most=LIMITS.json_bytes)
    try:
        result = parse_json(content)
        # A flipped bit may be in the name as well.
        for name in [n for n in result if _is_near(n)] if isinstance(result, dict) else ():
            if result.pop(name) != checksum(result) or name != CHECKSUM:
                raise ValueError("its checksum differs")
            result = result.get("", result)
    except ValueError as error:
        raise ValueError(f"{epath.Path(path)}: not valid JSON ({one_line(error)})") from None
    if not isinstance(result, form):
        raise ValueError(f"{epath.Path(path)}: expected {_form_name(form)}, got {short(result)}")
    return result


def _is_near(name: str) -> bool:
    return len(name) == len(CHECKSUM) and sum(map(operator.ne, name, CHECKSUM)) < 2


def checksum(value: Any) -> int:
    """The CRC of a value's JSON text."""
    return zlib.crc32(json.dumps(value).encode())


def _form_name(form: type | tuple[type, ...]) -> str:
    names = {dict: "an object", list: "a list", str: "a text"}
    forms = form if isinstance(form, tuple) else (form,)
    return " or ".join(names.get(one, one.__name__) for one in forms)


def short(value: Any) -> str:
    """Shorten a value to one line, for an error."""
    # Not even the text of a list of a million lists should be made.
    if isinstance(value, dict | list) and len(value) > 8:
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


class Reader:
    """A binary file with a known remaining length; reading beyond it raises ValueError."""

    def __init__(self, file: Any):
        self._file = file
        self._at = file.tell()
        self.size = file.seek(0, os.SEEK_END)
        file.seek(self._at)

    @property
    def left(self) -> int:
        return self.size - self._at

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int) -> None:
        """Go to a position in the file."""
        whole(offset, "offset", most=self.size)
        self._at = self._file.seek(offset)

    def need(self, count: int, field: str) -> None:
        """Raise unless this many bytes are left."""
        if not 0 <= count <= self.left:
            raise ValueError(f"truncated: {field} claims {count} bytes of the {self.left} left")

    def read(self, count: int, field: str = "a value") -> bytes:
        """Read this many bytes."""
        self.need(count, field)
        content = self._file.read(count)
        self._at += len(content)
        if len(content) < count:
            raise ValueError(f"truncated inside {field}")
        return content

    def readline(self) -> bytes:
        """Read to the end of a line, at most 64 KiB."""
        content = self._file.readline(1 << 16)
        self._at += len(content)
        return content

    def array(self, dtype: Any, count: int, field: str) -> np.ndarray:
        """Read this many numbers, into memory of their own."""
        dtype = np.dtype(dtype)
        self.need(count * dtype.itemsize, field)
        out = aligned(count * dtype.itemsize, np.uint8)
        fill(memoryview(out.data), self._file, field)
        self._at += len(out)
        return out.view(dtype)


def aligned(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """`np.empty` at a multiple of 64 bytes, which JAX on CPU uses without copying."""
    like = np.empty(0, dtype)
    size = int(np.prod(shape, dtype=np.int64)) * like.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(like.dtype).reshape(shape)


def fill(view: memoryview, file: Any, field: str) -> None:
    """Fill memory from a file, in pieces: some file systems return a copy of the whole request."""
    done = 0
    while done < len(view):
        piece = file.read(min(len(view) - done, 1 << 24))
        if not piece:
            raise ValueError(f"truncated inside {field}")
        view[done : done + len(piece)] = piece
        done += len(piece)


def open_zip(file: Any) -> zipfile.ZipFile:
    """A zip archive whose members together are no larger than an archive of its size allows."""
    size = Reader(file).size
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError) as error:
        raise ValueError(f"no readable zip archive ({one_line(error)})") from None
    members = archive.infolist()
    if len(members) > LIMITS.members:
        raise ValueError(f"expected at most {LIMITS.members} members, got {len(members)}")
    # Members may point at the same bytes, so many small members could each expand to a large one.
    if sum(member.compress_size for member in members) > size:
        raise ValueError("its members overlap")
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"member {member.filename!r} is compressed in an unknown way")
        stored = member.compress_type == zipfile.ZIP_STORED
        if stored and member.compress_size != member.file_size:
            raise ValueError(f"member {member.filename!r} states two sizes")
    expanded(sum(member.file_size for member in members), size, "its members")
    return archive


def expanded(bytes_: int, size: int, field: str) -> None:
    most = max(LIMITS.free_expansion, LIMITS.expansion * size)
    if bytes_ > most:
        raise ValueError(f"{field}: {size} bytes grow to {bytes_}, expected at most {most}")


def member_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, dtype: Any) -> np.ndarray:
    """The numbers of a zip archive's member, checked against its checksum, in memory once."""
    dtype, name = np.dtype(dtype), member.filename
    if member.file_size % dtype.itemsize:
        raise ValueError(f"{name} does not hold whole numbers")
    with archive.open(member) as file:
        out = np.empty(member.file_size, np.uint8)
        fill(memoryview(out.data), file, name)
        # The checksum is only compared when the end is read.
        file.read(1)
    return out.view(dtype)


def gunzip(content: bytes, field: str) -> bytes:
    """Unpack gzip data within the limits of expansion."""
    most = max(LIMITS.free_expansion, LIMITS.expansion * len(content))
    # 31: a window of 15 bits, plus 16 for gzip's header.
    unpacker = zlib.decompressobj(31)
    try:
        out = unpacker.decompress(content, most + 1)
    except zlib.error as error:
        raise ValueError(f"{field}: {one_line(error)}") from None
    if not unpacker.eof and len(out) <= most:
        raise ValueError(f"{field}: truncated")
    expanded(len(out), len(content), field)
    return out
