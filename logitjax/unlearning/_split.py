"""Rows split so that nothing that is chosen by, or reported, was trained on."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence

from logitjax.unlearning._rows import Row, normal, own_words

# Words that two rows share in a run before they count as copies, and the share of such runs.
_GRAM, _ALIKE = 8, 0.5
# A run that more rows have is of a form, not of what is said: it is looked for in the first alone.
_COMMON = 100
# Words, and single characters of scripts that put no space between words.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
_TRAIN, _VALIDATION = 0.6, 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Rows by what they are for.

    Attributes:
        parts: `forget`, which is to go and all of which is trained on; the same in other words,
            `reworded` for choosing and `reworded_test` for the end, empty without paraphrases; of
            what is to be kept `train`, `validation`, which settings are chosen by, and `test`,
            which is asked at the end alone; `holdout`, of the kind of `forget` and never trained
            on.
        left_out: Number of rows to keep or of the holdout that are linked to rows to forget.
        groups: Number of groups of `train`, `validation` and `test`.
    """

    parts: Mapping[str, tuple[Row, ...]]
    left_out: int
    groups: tuple[int, int, int]


def split_rows(
    forget: Sequence[Row],
    retain: Sequence[Row],
    holdout: Sequence[Row] = (),
    *,
    seed: int = 0,
) -> Split:
    """Split rows into parts for training, for choosing and for the report.

    Rows are linked if they share a `group`, or half of the runs of eight words of question (of a
    conversation the last turn) and answer. Linked rows come into one part, and rows that are linked
    to a row to forget are left out of the others. Groups are ordered by a hash of the seed and
    their text, and cut after 60 and 80 % of the rows.

    Args:
        forget: Rows to forget.
        retain: Rows to keep.
        holdout: Rows like those to forget that no model was trained on.
        seed: Seed of the order.

    Raises:
        ValueError: Fewer than three groups of rows to keep are left.

    >>> keep = [Row(prompt=f"{n}?", answer="yes") for n in range(10)]
    >>> split = split_rows([Row(prompt="a?", answer="b")], keep)
    >>> [len(split.parts[part]) for part in ("train", "validation", "test")]
    [6, 2, 2]
    """
    every = [*forget, *retain, *holdout]
    group = _groups(every)
    gone = set(group[: len(forget)])
    kept = [(row, g) for row, g in zip(retain, group[len(forget) :]) if g not in gone]
    unseen = [row for row, g in zip(holdout, group[len(forget) + len(retain) :]) if g not in gone]
    members: dict[int, list[Row]] = {}
    for row, g in kept:
        members.setdefault(g, []).append(row)
    if len(members) < 3:
        raise ValueError(
            f"retain: expected at least 3 groups of rows that are not linked to rows to forget, "
            f"got {len(members)}"
        )
    ordered = sorted(members.values(), key=lambda rows: _hash(seed, min(map(normal, rows))))
    parts: list[list[Row]] = [[], [], []]
    counts = [0, 0, 0]
    done = 0
    for place, rows in enumerate(ordered):
        share = done / len(kept)
        # The last two groups are kept for the two parts that nobody is trained on.
        left = len(ordered) - place
        part = 0 if share < _TRAIN and left > 2 else 1 if share < _VALIDATION and left > 1 else 2
        if part == 2 and not parts[1]:
            part = 1
        parts[part] += rows
        counts[part] += 1
        done += len(rows)
    again = [row for row in forget if row.paraphrases and row.asks]
    by_hash = sorted(again, key=lambda row: _hash(seed, normal(row)))
    half = -(-len(by_hash) // 2)  # the odd row is for choosing

    def reworded(rows: Sequence[Row]) -> tuple[Row, ...]:
        return tuple(row.asked(text) for row in rows for text in row.paraphrases)

    return Split(
        parts={
            "forget": tuple(forget),
            "reworded": reworded(by_hash[:half]),
            "reworded_test": reworded(by_hash[half:]),
            "train": tuple(parts[0]),
            "validation": tuple(parts[1]),
            "test": tuple(parts[2]),
            "holdout": tuple(unseen),
        },
        left_out=len(retain) - len(kept) + len(holdout) - len(unseen),
        groups=(counts[0], counts[1], counts[2]),
    )


def _groups(rows: Sequence[Row]) -> list[int]:
    """A number for each row, the same for rows that are linked."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]  # halves the path for the next look
            i = parent[i]
        return i

    named: dict[str, int] = {}
    grams = [_grams(own_words(row)) for row in rows]
    seen: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if row.group is not None:
            parent[root(i)] = root(named.setdefault(row.group, i))
        others: dict[int, int] = {}
        for gram in grams[i]:
            with_it = seen.setdefault(gram, [])
            for j in with_it:
                others[j] = others.get(j, 0) + 1
            if len(with_it) < _COMMON:
                with_it.append(i)
        for j, both in others.items():
            if both >= _ALIKE * (len(grams[i]) + len(grams[j]) - both):  # Jaccard's index
                parent[root(i)] = root(j)
    return [root(i) for i in range(len(rows))]


def _grams(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text) or [text]
    return {tuple(words[i : i + _GRAM]) for i in range(max(1, len(words) - _GRAM + 1))}


def _hash(seed: int, text: str) -> str:
    # Not hash(), which differs between processes.
    return hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest()
