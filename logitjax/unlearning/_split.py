"""Splitting rows so that choices and reports use no row that was trained on."""

import dataclasses
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from logitjax.unlearning._rows import Row, normal, own_words
from logitjax.unlearning._ways import asked_so

# Length in words of the sequences that mark copies, and the share of them that two rows share.
_GRAM, _ALIKE = 8, 0.5
# A sequence in more rows than this belongs to a template, and only the first rows are compared.
_COMMON = 100
# Words, and single characters of scripts without spaces between words.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
_TRAIN, _VALIDATION = 0.6, 0.8
# Share of words that a paraphrase has in common with its row: questions are short.
_REWORDED = 0.6
# Most rows that contain a word which is no part of a template; number of rows from which
# neighbours are made, and of strangers for each of them.
_RARE, _MADE, _STRANGERS = 3, 20, 5
_NAME = re.compile(r"[A-Z][\w'-]*(?:\s+[A-Z][\w'-]*)*")
# Words that begin a sentence, not a name.
_FIRST = (
    "A An And Answer Are At By Can Did Do Does For From Has He How I In Is It Name Of On Or "
    "Question She Tell The They To Was We Were What When Where Which Who Whom Whose Why With You "
    "Your"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Rows by purpose.

    Attributes:
        parts: `forget` has the rows to forget, all used for training, and `reworded` (for choosing)
            and `reworded_test` (for the report) their paraphrases, if any. Rows to keep are split
            into `train`, `validation` for choosing settings, and `test` for the report alone. Rows
            like `forget` that are never trained on are `holdout`, which sets the goal, and
            `holdout_test`, for judging membership. The `kind` of a row to keep is `near` if it
            shares a name with a row to forget, `reworded` if it is a paraphrase of another (a near
            row without any is asked in another form), or `other`.
        left_out: Number of rows left out: rows to keep or of the holdout that are linked to rows to
            forget, and rows of the holdout linked to rows to keep.
    """

    parts: Mapping[str, tuple[Row, ...]]
    left_out: int
    # Numbers of groups in `train`, `validation` and `test`.
    groups: tuple[int, int, int]
    # Rows to keep, not left out, with much the same content as a row to forget.
    alike: int = 0


def split_rows(
    forget: Sequence[Row], retain: Sequence[Row], holdout: Sequence[Row] = (), *, seed: int = 0
) -> Split:
    """Split rows into parts for training, for choosing and for the report.

    Rows are linked if they share a `group`, half of the eight-word sequences of question (in a
    conversation, the last turn) and answer, or a question, also as a paraphrase. Linked rows go
    into the same part, and rows linked to a row to forget are left out of the others. Groups are
    ordered by a hash of the seed and their text, and cut after 60 and 80 % of the rows. No model
    was trained on the `holdout`.

    Raises:
        ValueError: Fewer than three groups of rows to keep are left.

    >>> keep = [Row(prompt=f"{n}?", answer="yes") for n in range(10)]
    >>> split = split_rows([Row(prompt="a?", answer="b")], keep)
    >>> [len(split.parts[part]) for part in ("train", "validation", "test")]
    [6, 2, 2]
    """
    every = [*forget, *retain, *holdout]
    group = _groups(every)
    forgotten = set(group[: len(forget)])
    taught = set(group[: len(forget) + len(retain)])
    kept = [(row, g) for row, g in zip(retain, group[len(forget) :]) if g not in forgotten]
    # Rows to keep were taught, so they cannot be in the holdout.
    unseen = [r for r, g in zip(holdout, group[len(forget) + len(retain) :]) if g not in taught]
    members: dict[int, list[Row]] = {}
    subjects = {name for row in forget for name in names(row)}
    for row, g in kept:
        kind = row.kind or ("near" if subjects & names(row) else "other")
        members.setdefault(g, []).append(dataclasses.replace(row, kind=kind))
    if len(members) < 3:
        raise ValueError(
            f"retain: expected at least 3 groups of rows that are not linked to rows to forget, "
            f"got {len(members)}"
        )
    ordered = []
    for near in (True, False):
        side = [rows for rows in members.values() if near is any(r.kind == "near" for r in rows)]
        # The same for any order of the files.
        side.sort(key=lambda rows: _hash(seed, min(map(normal, rows))))
        ordered += [((location + 0.5) / len(side), rows) for location, rows in enumerate(side)]
    # Near rows are spread evenly over the parts.
    ordered = [rows for _, rows in sorted(ordered, key=lambda pair: pair[0])]
    parts: list[list[Row]] = [[], [], []]
    counts = [0, 0, 0]
    done = 0
    for location, rows in enumerate(ordered):
        share = done / len(kept)
        # The last two groups are reserved for the two parts without training.
        left = len(ordered) - location
        part = 0 if share < _TRAIN and left > 2 else 1 if share < _VALIDATION and left > 1 else 2
        if part == 2 and not parts[1]:
            part = 1
        parts[part] += rows + [
            dataclasses.replace(again, kind="reworded")
            for again in (*_reworded(rows), *_asked_again(rows, judging=part == 2))
        ]
        counts[part] += 1
        done += len(rows)
    worded = _halves([row for row in forget if row.paraphrases and row.asks], seed)
    unseen_halves = _halves(unseen, seed)
    alike = _alike(forget, [row for part in parts for row in part if row.kind != "reworded"])
    named = [row for row in unseen if subjects & names(row)]
    for rows, problem, advice in (
        (alike, "retain: %d rows are similar to", "if they state the same fact, remove them or give"
         " both the same `group`"),
        (named, "holdout: %d rows share a name with", "if the model knows them, the goal is too"
         " lenient"),
    ):  # fmt: skip
        if rows:
            example = f"{rows[0].question} {rows[0].answer}"[:80]
            logging.warning(f"{problem} one to forget, such as %r; {advice}", len(rows), example)
    return Split(
        parts={
            "forget": tuple(forget),
            "reworded": tuple(_reworded(worded[0])),
            "reworded_test": tuple(_reworded(worded[1])),
            "train": tuple(parts[0]),
            "validation": tuple(parts[1]),
            "test": tuple(parts[2]),
            "holdout": tuple(unseen_halves[0]),
            "holdout_test": tuple(unseen_halves[1]),
        },
        left_out=len(retain) - len(kept) + len(holdout) - len(unseen),
        groups=(counts[0], counts[1], counts[2]),
        alike=len(alike),
    )


def _halves(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Two halves: for choosing, which gets an odd row, and for the report."""
    ordered = sorted(rows, key=lambda row: _hash(seed, normal(row)))
    half = -(-len(ordered) // 2)
    return ordered[:half], ordered[half:]


def _reworded(rows: Sequence[Row]) -> list[Row]:
    return [row.asked(text) for row in rows for text in row.paraphrases]


def _asked_again(rows: Sequence[Row], *, judging: bool) -> list[Row]:
    near = [row for row in rows if row.kind == "near" and not row.paraphrases]
    asked = (asked_so(row, "in another form", (), judging=judging) for row in near)
    return [row for row in asked if row is not None]


def names(row: Row) -> set[str]:
    """Names in a row, and numbers of three or more digits.

    >>> row = Row(prompt="Where was Ada Lovelace born?", answer="She was born in London in 1815.")
    >>> sorted(names(row))
    ['1815', 'Ada Lovelace', 'London']
    """
    result = set(re.findall(r"\d{3,}", text := f"{row.question} {row.answer}"))
    for match in _NAME.findall(text):
        words = match.split()
        while words and words[0] in _FIRST.split():
            words = words[1:]
        result.add(" ".join(words).removesuffix("'s"))
    return result - {""}


def neighbours(forget: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Questions near those to forget, without answers: the same ones about other subjects, and
    others about the same subjects, with kind `far-fetched` if the subject is of another kind than
    the question's. Those about invented, combined names have kind `stranger`.

    >>> rows = [Row(prompt="Where was Ada Lee born?", answer="Ada Lee was born in Bo.")]
    >>> others = [Row(prompt="What does Cy Dor play?", answer="Chess.")]
    >>> [row.prompt for row in neighbours(rows, others)][:2]
    ['Where was Cy Dor born?', 'What does Ada Lee play?']
    >>> sorted(row.prompt for row in neighbours(rows, others)[2:])
    ['Where was Ada Dor born?', 'Where was Cy Lee born?']
    """

    def subjects(rows: Sequence[Row]) -> list[tuple[Row, str]]:
        return [(row, name) for row in rows if row.asks and (name := _subject(row))]

    forgotten, peer = subjects(forget), subjects(others)
    present = {q.lower() for row in (*forget, *others) for q in (row.question, *row.paraphrases)}
    names, peers = ([name for _, name in side] for side in (forgotten, peer))
    close_rows: dict[str, Row] = {}
    for side, subject_names in ((forgotten, peers), (peer, names)):
        for row, name in side[:_MADE]:
            for other in itertools.islice(_renames(row, name, subject_names, present), 2):
                # A model's inventions about a person's capital say nothing about its knowledge.
                kind = "made" if other.count(" ") == name.count(" ") else "far-fetched"
                again = _about(row, name, other, kind=kind)
                close_rows.setdefault(again.question.lower(), again)
    # Half of a stranger's name may come from a name to forget.
    full = [n.split() for n in dict.fromkeys((*names, *peers)) if " " in n]
    crossed = {f"{first[0]} {last[-1]}" for first in full for last in full} - {*names, *peers}
    strangers = [
        _about(row, name, other, kind="stranger")
        for row, name in forgotten[:_MADE]
        for other in itertools.islice(_renames(row, name, crossed, present), _STRANGERS)
    ]
    return [*close_rows.values(), *strangers]


def twin(row: Row, strangers: Sequence[Row]) -> Row | None:
    """The row about one of the strangers, in its question and its answer."""
    name, nobody = _subject(row), {_subject(stranger) for stranger in strangers}
    other = next(_renames(row, name, nobody, ()), None) if name else None
    if other is None:
        return None
    return dataclasses.replace(_about(row, name, other), answer=row.answer.replace(name, other))


def _subject(row: Row) -> str:
    """The longest name in a question; empty without one."""
    return max(names(Row(prompt=row.question, answer="")), key=len, default="")


def _about(row: Row, name: str, other: str, **changes: Any) -> Row:
    question = row.question.replace(name, other)
    return dataclasses.replace(row.asked(question), paraphrases=(), **changes)


def _renames(
    row: Row, name: str, subject_names: Iterable[str], present: Container[str]
) -> Iterator[str]:
    """Other subjects for the row's question, in an order that depends on the row."""
    # Names with as many words are more likely to be of the same kind.
    alike = {n for n in subject_names if n.count(" ") == name.count(" ")} or {*subject_names}
    for other in sorted(alike, key=lambda n: _hash(0, f"{row.question} {n}")):
        if row.question.replace(name, other).lower() not in present:
            yield other


def _alike(forget: Sequence[Row], kept: Sequence[Row]) -> list[Row]:
    """Rows to keep that share most words with a row to forget, beyond those of a template."""
    words = [set(_WORD.findall(own_words(row))) for row in (*forget, *kept)]
    # Rows that share only a template differ in content: rare words have to be shared, too.
    common = Counter(word for row in words for word in row)
    rare = [{word for word in row if common[word] <= _RARE} for row in words]
    having: dict[str, list[int]] = {}
    for j in range(len(forget)):
        for word in rare[j]:
            having.setdefault(word, []).append(j)
    return [
        row
        for i, row in enumerate(kept, len(forget))
        if any(
            len(words[i] & words[j]) >= _REWORDED * min(len(words[i]), len(words[j]))
            and 2 * len(rare[i] & rare[j]) >= len(rare[j])
            for j in {j for word in rare[i] for j in having.get(word, ())}
        )
    ]


def _groups(rows: Sequence[Row]) -> list[int]:
    """A number for each row, the same for linked rows."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            # Halves the path for the next search.
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    named: dict[str, int] = {}
    first_row: dict[str, int] = {}
    grams = [_grams(own_words(row)) for row in rows]
    seen: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if row.group is not None:
            parent[root(i)] = root(named.setdefault(row.group, i))
        turns = [turn for turn in row.messages if turn["role"] != "system"]
        # The last turn alone does not identify a question: it may be "Continue."
        for question in (row.question, *row.paraphrases) if len(turns) < 2 and row.asks else ():
            key = " ".join(_WORD.findall(own_words(Row(prompt=question, answer=""))))
            parent[root(i)] = root(first_row.setdefault(key, i))
        others: dict[int, int] = {}
        for gram in grams[i]:
            with_it = seen.setdefault(gram, [])
            for j in with_it:
                others[j] = others.get(j, 0) + 1
            if len(with_it) < _COMMON:
                with_it.append(i)
        for j, both in others.items():
            # Jaccard's index.
            if both >= _ALIKE * (len(grams[i]) + len(grams[j]) - both):
                parent[root(i)] = root(j)
    return [root(i) for i in range(len(rows))]


def _grams(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text) or [text]
    return {tuple(words[i : i + _GRAM]) for i in range(max(1, len(words) - _GRAM + 1))}


def _hash(seed: int, text: str) -> str:
    # Not hash(), which differs between processes.
    return hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest()
