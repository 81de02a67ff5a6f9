"""Examples: what every source yields, whatever it was read from."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from logitjax.storage import digest

Example = Mapping[str, Any]

_SPLIT = re.compile(r"(?P<name>\w+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class Examples(Sequence):
    """A sequence of examples that knows where it came from.

    Each example is a mapping with an ``id``, perhaps the ``teacher`` that it is for, and one of
    ``text``, ``prompt`` + ``response``, or ``messages`` (a list of ``role``/``content`` mappings).

    Args:
        rows: the examples; anything with a length and random access.
        fingerprint: a hash that changes with the content; computed from the rows when not given.
        errors: how many malformed rows the source skipped; a slice has those of the whole.
        source: the specification they were read from, for messages.

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
        picked = [self._rows[i] for i in range(start, stop, step)]
        fingerprint = digest(self.fingerprint, start, stop, step)
        source = f"{self.source}[{start}:{stop}:{step}]"
        # Where the malformed rows were is not known: each part says how many its source had.
        return Examples(picked, fingerprint=fingerprint, errors=self.errors, source=source)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"Examples({self.source!r}, {len(self)} examples, {self.errors} errors)"


def parse_split(split: str) -> tuple[str, str | None, str | None]:
    """``'train[10%:20%]'`` to ``('train', '10%', '20%')``."""
    match = _SPLIT.fullmatch(split.replace(" ", ""))
    if match is None:
        raise ValueError(
            f"split: expected the form of 'train', 'train[:90%]' or 'train[100:]', got {split!r}"
        )
    return match["name"], match["start"], match["stop"]


def slice_of(start: str | None, stop: str | None, length: int) -> slice:
    """The rows that a parsed split names; percentages round to the nearest row."""

    def position(text: str | None, default: int) -> int:
        if text is None:
            return default
        if text.endswith("%"):
            value = round(int(text[:-1]) * length / 100)
        else:
            value = int(text)
        return min(length, max(0, value + length if value < 0 else value))

    return slice(position(start, 0), position(stop, length))


def normalise(row: Any, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Reduce a row to one of the three forms; raises ValueError with the reason."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    if columns:
        row = {columns.get(key, key): value for key, value in row.items()}
    forms = [f for f in (("text",), ("prompt", "response"), ("messages",)) if f[0] in row]
    if len(forms) != 1:
        raise ValueError(
            "expected exactly one of 'text', 'prompt' + 'response' or 'messages', got the keys "
            + repr(sorted(map(str, row)))
        )
    (form,) = forms
    kept = {name: str(row[name]) for name in ("id", "teacher") if name in row}
    if form == ("messages",):
        return kept | {"messages": _check_messages(row["messages"])}
    for key in form:
        value = row.get(key)
        if not isinstance(value, str):
            raise ValueError(f"{key!r}: expected a string, got {type(value).__name__}")
        if key != "prompt" and not value.strip():
            raise ValueError(f"{key!r} is empty")
        _check_encodable(key, value)
        kept[key] = value
    return kept


def _check_encodable(key: str, value: str) -> None:
    # JSON may hold half of a surrogate pair, at which tokenizers fail with a TypeError.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key!r}: expected Unicode text, got half a surrogate pair at character {error.start}"
        ) from None


def _check_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages': expected a list that is not empty")
    for message in messages:
        valid = isinstance(message, Mapping) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not valid:
            raise ValueError(f"message: expected strings 'role' and 'content', got {message!r}")
        for key in ("role", "content"):
            _check_encodable(key, message[key])
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("'messages' has no message of role 'assistant', so nothing to learn from")
    return [{"role": m["role"], "content": m["content"]} for m in messages]
