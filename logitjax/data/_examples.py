"""Examples, the common form of all sources."""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

from logitjax.storage import digest

Example = Mapping[str, Any]

_SPLIT = re.compile(r"(?P<name>\w+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


# Characters of rows to hold in memory; a larger source is read again each time, in order.
_HELD_CHARACTERS = 1 << 25


class Stream(Sequence):
    """Rows that are read on access; read in order they take no memory."""

    def __init__(self, read: Callable[[], Iterator[Any]], start: int, stop: int):
        self._read, self._start, self._stop = read, start, max(start, stop)
        self._cursor: Iterator[Any] = iter(())
        self._next, self._last = self._stop - self._start, None

    def part(self, start: int, stop: int) -> "Stream":
        return Stream(self._read, self._start + start, self._start + stop)

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._read(), self._start, self._stop)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        if index < self._next - 1:
            self._cursor, self._next = iter(self), 0
        for row in itertools.islice(self._cursor, index + 1 - self._next):
            self._last, self._next = row, self._next + 1
        if self._next != index + 1:
            raise ValueError(f"row {index}: its source has changed since it was opened")
        return self._last


def collected(
    read: Callable[[], Iterator[Any]], again: Callable[[], Iterator[Any]], source: str
) -> "Examples":
    """Hold the rows of `read` in memory if they fit; otherwise `again` reads them each time."""
    rows: list[Any] | None = []
    state, count, size = hashlib.sha256(), 0, 0
    for row in read():
        text = str(row).encode("utf-8", "surrogatepass")
        state.update(b"%d:" % len(text) + text)
        count, size = count + 1, size + len(text)
        if rows is not None:
            rows.append(row)
            rows = rows if size <= _HELD_CHARACTERS else None
    kept = Stream(again, 0, count) if rows is None else rows
    return Examples(kept, fingerprint=state.hexdigest(), source=source)


class Examples(Sequence):
    """A sequence of examples that records its source.

    Each example is a mapping with an ``id``, optionally the ``teacher`` that it is for, and one of
    ``text``, ``prompt`` + ``response``, or ``messages`` (a list of ``role``/``content`` mappings,
    optionally with the ``tools`` that they call).

    Args:
        rows: the examples; anything with a length and random access.
        fingerprint: a hash that changes with the content; computed from the rows by default.
        errors: number of malformed rows that the source skipped; slices have the same number.
        source: the specification that they were read from, for messages.

    >>> examples = Examples([{"id": "a", "text": "one"}, {"id": "b", "text": "two"}])
    >>> len(examples), examples[1]["text"], examples.errors
    (2, 'two', 0)
    """

    def __init__(
        self,
        rows: Sequence[Any],
        *,
        fingerprint: str | None = None,
        errors: int = 0,
        source: str = "examples",
    ):
        self._rows = rows
        self._fingerprint = fingerprint
        self.errors = errors
        self.source = source

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = digest([dict(row) for row in self._rows])
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self._rows[index]
        start, stop, step = index.indices(len(self))
        if step == 1 and isinstance(self._rows, Stream):
            picked: Sequence[Any] = self._rows.part(start, stop)
        else:
            picked = [self._rows[i] for i in range(start, stop, step)]
        fingerprint = digest(self.fingerprint, start, stop, step)
        source = f"{self.source}[{start}:{stop}:{step}]"
        # The location of malformed rows is unknown, so each part has the number of the source.
        return Examples(picked, fingerprint=fingerprint, errors=self.errors, source=source)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"Examples({self.source!r}, {len(self)} examples, {self.errors} errors)"


def parse_split(split: str) -> tuple[str, str | None, str | None]:
    """Parse ``'train[10%:20%]'`` into ``('train', '10%', '20%')``."""
    match = _SPLIT.fullmatch(split.replace(" ", ""))
    if match is None:
        raise ValueError(
            f"split: expected the form of 'train', 'train[:90%]' or 'train[100:]', got {split!r}"
        )
    return match["name"], match["start"], match["stop"]


def slice_of(start: str | None, stop: str | None, length: int) -> slice:
    """Convert a parsed split to rows; percentages are rounded to the nearest row."""

    def position(text: str | None, default: int) -> int:
        if text is None:
            return default
        value = round(int(text[:-1]) * length / 100) if text.endswith("%") else int(text)
        return min(length, max(0, value + length if value < 0 else value))

    return slice(position(start, 0), position(stop, length))
