"""Several sources in turn, by weight."""

import re
from collections.abc import Iterator, Sequence

from logitjax.data._examples import Example, Examples, collected


def parts_of(spec: str) -> list[tuple[str, float]]:
    """Parse the sources of a mixture and their weights.

    >>> parts_of("mix:jsonl:a.jsonl@3,text:b@1")
    [('jsonl:a.jsonl', 3.0), ('text:b', 1.0)]
    """
    parts = []
    for part in spec.removeprefix("mix:").split(","):
        match = re.fullmatch(r"(.+)@(\d*\.?\d+)", part)
        if match is None or not float(match[2]):
            raise ValueError(f"{spec}: expected SOURCE@WEIGHT with a positive weight, got {part!r}")
        parts.append((match[1], float(match[2])))
    return parts


def mixed(spec: str, sources: Sequence[Examples]) -> Examples:
    """Mix documents by their share of the characters, each at most once, until a source ends."""
    weights = [weight for _, weight in parts_of(spec)]

    def read() -> Iterator[Example]:
        readers, sizes = [iter(source) for source in sources], [0.0] * len(sources)
        while True:
            # The source furthest behind its share: deterministic, so there is no state to keep.
            i = min(range(len(sources)), key=lambda i: sizes[i] / weights[i])
            if (row := next(readers[i], None)) is None:
                return
            texts = [row.get(key, "") for key in ("text", "prompt", "response")]
            turns = [message["content"] for message in row.get("messages", ())]
            sizes[i] += sum(map(len, texts + turns))
            yield row

    examples = collected(read, read, spec)
    examples.errors = sum(source.errors for source in sources)
    return examples
