"""Text and JSON-lines files as examples."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

from logitjax.data._examples import Examples, normalise, parse_split, slice_of
from logitjax.data._places import files_below
from logitjax.storage import digest, guard

# A paragraph alone is too little context, and a book as one document leaves nothing to hold out.
_MIN_DOCUMENT = 2000
_MAX_WARNINGS = 10  # a file of another form would flood the log
_HELD_OUT = ("validation", "test")
_BOM = b"\xef\xbb\xbf"  # of UTF-8


class _Errors:
    """Counts malformed rows; raises on the first one unless they are to be skipped."""

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
            logging.warning("further malformed rows are counted silently")


def _files(path: str, suffixes: tuple[str, ...], name: str, spec: str) -> list[epath.Path]:
    """The files of one split: PATH itself, PATH/<split>/, PATH/<split>.<suffix>, or all below."""
    root = epath.Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{spec}: no such file or directory: {root}")
    if root.is_dir():
        below = root / name
        files = [root / (name + suffix) for suffix in suffixes]
        files = [file for file in files if file.exists()]
        if below.exists() and below.is_dir():
            root = below
        elif files:
            return files
        elif name != "train":
            raise ValueError(_no_split(spec, name))
        files = sorted(file for file in files_below(root) if file.name.endswith(suffixes))
        if root != below:
            files = [file for file in files if not _held_out(file, root)]
        if not files:
            raise FileNotFoundError(f"{spec}: no {' or '.join(suffixes)} file under {root}")
        return files
    if name != "train":
        raise ValueError(_no_split(spec, name))
    return [root]


def _held_out(file: epath.Path, root: epath.Path) -> bool:
    """Whether a file below `root` is another split's, and so none of the training data."""
    first = file.relative_to(root).parts[0]
    return first.partition(".")[0] in _HELD_OUT


def held_out_splits(path: str, suffixes: tuple[str, ...]) -> set[str]:
    """Which held-out splits a folder has as files or folders of their own."""
    root = epath.Path(path).expanduser()
    if not path or not root.is_dir():
        return set()
    found = set()
    for name in _HELD_OUT:
        files = [root / (name + suffix) for suffix in suffixes]
        # A folder `test` of something else is no split.
        inside = files_below(root / name) if (root / name).is_dir() else iter(())
        if any(file.exists() for file in files) or any(f.name.endswith(suffixes) for f in inside):
            found.add(name)
    return found


def _no_split(spec: str, name: str) -> str:
    return (
        f"{spec} has no split {name!r}: take a part of it (split='train[95%:]') or give a "
        f"directory with one file or folder a split"
    )


def paragraphs_to_documents(text: str, minimum: int = _MIN_DOCUMENT) -> list[str]:
    """Join blank-line separated blocks, in order, into documents of at least `minimum` characters.

    >>> paragraphs_to_documents("a b\\n\\nc\\n\\n\\nd e f", minimum=4)
    ['a b\\n\\nc', 'd e f']
    """
    documents: list[str] = []
    pending: list[str] = []
    # A line of spaces is blank too.
    for block in re.split(r"\n[^\S\n]*\n\s*", text.replace("\r\n", "\n").strip()):
        pending.append(block)
        if sum(map(len, pending)) >= minimum:
            documents.append("\n\n".join(pending))
            pending = []
    if pending:
        documents.append("\n\n".join(pending))
    return [document for document in documents if document.strip()]


def load_text(path: str, *, split: str, on_error: str, spec: str) -> Examples:
    """A directory's files are one document each; a single file is cut between paragraphs."""
    whole_files = epath.Path(path).expanduser().is_dir()

    def read(file: epath.Path, content: bytes, errors: _Errors) -> Iterator[dict[str, Any]]:
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            return errors.report(str(file), f"not UTF-8 at byte {error.start}")
        documents = [text] if whole_files else paragraphs_to_documents(text)
        for i, document in enumerate(filter(str.strip, documents)):
            yield {"id": f"{file.name}:{i}", "text": document}

    how = "files" if whole_files else f"paragraphs {_MIN_DOCUMENT}"
    return _load(path, ".txt", read, how, split=split, on_error=on_error, spec=spec)


def load_jsonl(
    path: str, *, split: str, on_error: str, spec: str, columns: Mapping[str, str] | None = None
) -> Examples:
    """One JSON object a line, read into memory; larger corpora belong in a tfds dataset."""

    def read(file: epath.Path, content: bytes, errors: _Errors) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = normalise(guard.parse_json(line), columns)
            except json.JSONDecodeError as error:
                errors.report(f"{file}:{number}", f"not JSON: {error.msg} at column {error.colno}")
            except ValueError as error:
                errors.report(f"{file}:{number}", error)
            else:
                yield {"id": f"{file.name}:{number}"} | row

    how = dict(columns or {})
    return _load(path, ".jsonl", read, how, split=split, on_error=on_error, spec=spec)


def _load(
    path: str,
    suffix: str,
    read: Callable[[epath.Path, bytes, _Errors], Iterator[dict[str, Any]]],
    how: Any,
    *,
    split: str,
    on_error: str,
    spec: str,
) -> Examples:
    """The rows that `read` makes of the files of a split; `how` it does decides them too."""
    name, start, stop = parse_split(split)
    errors, rows, made_from = _Errors(on_error), [], [how]
    for file in _files(path, (suffix,), name, spec):
        # A mark that some editors write, and no part of the first row.
        content = file.read_bytes().removeprefix(_BOM)
        made_from.append(digest(content))
        rows += read(file, content, errors)
    if errors.count:
        logging.warning("%s: %d malformed rows skipped, %d kept", spec, errors.count, len(rows))
    part = slice_of(start, stop, len(rows))
    fingerprint = digest(made_from, part.start, part.stop)
    return Examples(rows[part], fingerprint=fingerprint, errors=errors.count, source=spec)
