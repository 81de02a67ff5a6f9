"""Text, JSON lines and Parquet, also compressed, as rows that can be read repeatedly."""

import contextlib
import gzip
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

from logitjax.data._examples import Examples, collected, parse_split, slice_of
from logitjax.data._forms import normalise
from logitjax.data._places import files_below
from logitjax.storage import guard, require

# A paragraph is too little context, and a book as one document leaves nothing to hold out.
_MIN_DOCUMENT = 2000
# A file in another format would flood the log.
_MAX_WARNINGS = 10
_HELD_OUT = ("validation", "test")
_BOM = b"\xef\xbb\xbf"  # of UTF-8
_PACKED = ("", ".gz", ".zst")
# File suffixes of each kind to search for in folders; a single file may have any name.
SUFFIXES = {
    "text": tuple(".txt" + packed for packed in _PACKED),
    "jsonl": tuple(".jsonl" + packed for packed in _PACKED),
    "parquet": (".parquet",),
}
# Names of a split's files on the hub.
_NUMBERED = r"-\d+-of-\d+\..*"

Report = Callable[[str, object], None]
Rows = Iterator[dict[str, Any]]


class Errors:
    """Count malformed rows, or raise on the first one."""

    def __init__(self, on_error: str):
        self._raise = on_error == "raise"
        self.count = 0

    def report(self, where: str, reason: object) -> None:
        if self._raise:
            raise ValueError(f"{where}: {reason}")
        self.count += 1
        if self.count <= _MAX_WARNINGS:
            logging.warning("skipped malformed row %s: %s", where, reason)
        if self.count == _MAX_WARNINGS:
            logging.warning("further malformed rows are counted without a message")


def _files(path: str, suffixes: tuple[str, ...], name: str, spec: str) -> list[epath.Path]:
    """Files of a split: PATH itself, PATH/<split>/, PATH/<split>.<suffix>, or all files below."""
    root = epath.Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{spec}: no such file or directory: {root}")
    if root.is_dir():
        below = root / name
        files = _named(root, name, suffixes)
        if below.exists() and below.is_dir():
            root = below
        elif files:
            return files
        elif name != "train":
            raise ValueError(no_split(spec, name))
        files = sorted(file for file in files_below(root) if file.name.endswith(suffixes))
        if root != below:
            files = [file for file in files if not _held_out(file, root)]
        if not files:
            raise FileNotFoundError(f"{spec}: no {suffixes[0]} file under {root}")
        return files
    if name != "train":
        raise ValueError(no_split(spec, name))
    return [root]


def _named(root: epath.Path, name: str, suffixes: tuple[str, ...]) -> list[epath.Path]:
    """Files of a split in a folder: `test.jsonl`, `test-00000-of-00002.parquet`."""
    pattern = f"{name}({_NUMBERED}|{'|'.join(map(re.escape, suffixes))})"
    files = [file for file in root.iterdir() if re.fullmatch(pattern, file.name)]
    return sorted(file for file in files if file.name.endswith(suffixes))


def _held_out(file: epath.Path, root: epath.Path) -> bool:
    """Whether a file below `root` belongs to a held-out split and not to the training data."""
    first = file.relative_to(root).parts[0]
    return re.sub(_NUMBERED, "", first).partition(".")[0] in _HELD_OUT


def held_out_splits(path: str, suffixes: tuple[str, ...]) -> set[str]:
    """Held-out splits that a folder has as separate files or folders."""
    root = epath.Path(path).expanduser()
    if not path or not root.is_dir():
        return set()
    splits = set()
    for name in _HELD_OUT:
        # A folder `test` with other files is not a split.
        inside = files_below(root / name) if (root / name).is_dir() else iter(())
        if _named(root, name, suffixes) or any(f.name.endswith(suffixes) for f in inside):
            splits.add(name)
    return splits


def no_split(spec: str, name: str) -> str:
    return (
        f"{spec} has no split {name!r}: take a part of it (split='train[95%:]') or give a "
        f"directory with one file or folder a split"
    )


def paragraphs_to_documents(lines: Iterable[str], minimum: int = _MIN_DOCUMENT) -> Iterator[str]:
    """Join blocks between blank lines, in order, into documents of at least `minimum` characters.

    >>> list(paragraphs_to_documents("a b\\n\\nc\\n\\n\\nd e f".split("\\n"), minimum=4))
    ['a b\\n\\nc', 'd e f']
    """
    block: list[str] = []
    pending: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line if block else line.lstrip())
            continue
        pending += ["\n".join(block)] if block else []
        block = []
        if sum(map(len, pending)) >= minimum:
            yield "\n\n".join(pending)
            pending = []
    pending += ["\n".join(block)] if block else []
    if pending:
        yield "\n\n".join(pending).rstrip()


@contextlib.contextmanager
def _opened(file: epath.Path) -> Iterator[Any]:
    with file.open("rb") as raw:
        if file.name.endswith(".gz"):
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
        elif file.name.endswith(".zst"):
            unpacker = require("zstandard", extra="datasets").ZstdDecompressor()
            yield io.BufferedReader(unpacker.stream_reader(raw, read_across_frames=True), 1 << 20)
        else:
            yield raw


def _lines(file: epath.Path, report: Report) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines with line ends; a line longer than any row is reported."""
    longest = guard.LIMITS.json_bytes
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(_opened(file))
        for number in itertools.count(1):
            try:
                line = opened.readline(longest)
                if long := len(line) == longest and not line.endswith(b"\n"):
                    # Do not hold a line in memory that is too long for a row.
                    while (rest := opened.readline(longest)) and not rest.endswith(b"\n"):
                        pass
            # zstandard is optional, so its errors cannot be named here.
            except Exception as error:
                return report(str(file), f"damaged after line {number - 1} ({error})")
            if long:
                report(f"{file}:{number}", f"longer than {longest} bytes")
            elif not line:
                return None
            else:
                # A byte order mark, which some editors write, is not part of the first row.
                yield number, line.removeprefix(_BOM) if number == 1 else line


def _text_rows(file: epath.Path, report: Report, per_file: bool) -> Rows:
    size, broken = 0, None

    def lines() -> Iterator[str]:
        nonlocal size, broken
        for _, line in _lines(file, report):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                broken = f"not UTF-8 at byte {size + error.start}"
                return
            size += len(line)

    if per_file:
        text = "".join(lines())
        documents: Iterable[str] = [] if broken else [text]
    else:
        bare = (line.removesuffix("\n").removesuffix("\r") for line in lines())
        documents = paragraphs_to_documents(bare)
    for i, document in enumerate(filter(str.strip, documents)):
        yield {"id": f"{file.name}:{i}", "text": document}
    if broken:
        report(str(file), broken)


def _jsonl_rows(file: epath.Path, report: Report) -> Iterator[tuple[int, Any]]:
    """Yield objects of lines, or of a single list, as Alpaca and ShareGPT are distributed."""
    lines = _lines(file, report)
    for number, line in lines:
        if not line.strip():
            continue
        try:
            if number == 1 and line.lstrip().startswith(b"["):
                content = b"".join([line, *(more for _, more in lines)])
                yield from enumerate(guard.parse_json(content), start=1)
            else:
                yield number, guard.parse_json(line)
        except json.JSONDecodeError as error:
            report(f"{file}:{number}", f"not JSON: {error.msg} at column {error.colno}")
        except ValueError as error:
            report(f"{file}:{number}", error)


def _parquet_rows(file: epath.Path, report: Report) -> Iterator[tuple[int, Any]]:
    parquet = require("pyarrow.parquet", extra="datasets")
    count = itertools.count(1)
    try:
        with file.open("rb") as opened:
            for batch in parquet.ParquetFile(opened).iter_batches(batch_size=256):
                yield from ((next(count), row) for row in batch.to_pylist())
    except (OSError, ValueError) as error:
        report(str(file), guard.one_line(error))


def normalised(
    rows: Iterable[tuple[int, Any]],
    where: str,
    name: str,
    report: Report,
    columns: Mapping[str, str] | None,
) -> Rows:
    """Yield rows in the library's forms, with an id."""
    for number, raw in rows:
        try:
            row = normalise(raw, columns)
        except ValueError as error:
            report(f"{where}:{number}", error)
        else:
            yield {"id": f"{name}:{number}"} | row


def load_files(
    kind: str,
    path: str,
    *,
    split: str,
    on_error: str,
    spec: str,
    columns: Mapping[str, str] | None = None,
) -> Examples:
    files = _files(path, SUFFIXES[kind], parse_split(split)[0], spec)
    per_file = epath.Path(path).expanduser().is_dir()

    def read(report: Report) -> Rows:
        for file in files:
            if kind == "text":
                yield from _text_rows(file, report, per_file)
            else:
                rows = (_jsonl_rows if kind == "jsonl" else _parquet_rows)(file, report)
                yield from normalised(rows, str(file), file.name, report, columns)

    return part_of(read, split=split, on_error=on_error, spec=spec)


def part_of(read: Callable[[Report], Rows], *, split: str, on_error: str, spec: str) -> Examples:
    """Rows of a split that `read` gives; malformed rows are reported in the first reading."""
    errors = Errors(on_error)
    examples = collected(
        lambda: read(errors.report), lambda: read(lambda where, reason: None), spec
    )
    examples.errors = errors.count
    if errors.count:
        logging.warning("%s: %d malformed rows skipped, %d kept", spec, errors.count, len(examples))
    _, start, stop = parse_split(split)
    complete = start is None and stop is None
    return examples if complete else examples[slice_of(start, stop, len(examples))]
