"""TOFU: questions about invented authors, with paraphrases and wrong answers."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from logitjax import storage

QUESTIONS_PER_AUTHOR = 20
_AUTHORS = 200
_SPLIT = re.compile(r"(forget|retain)(\d\d)(_perturbed)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A question, its answer, their paraphrases and wrong answers.

    Attributes:
        paraphrased_question: in other words; only in the ``_perturbed`` splits of TOFU's own
            authors.
        paraphrased_answer: in other words; likewise. The real-world sets have none: their short
            ``answer`` stands in for it (`truth`).
        perturbed_answers: wrong answers in the shape of the right one: 5, or 3 in the real-world
            sets.
        index: which line of its file, from 0; TOFU's logs are keyed by it.
        author: which of the 200 authors, from 0; None for the real-world sets.
    """

    question: str
    answer: str
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    index: int = 0
    author: int | None = None

    @property
    def truth(self) -> str:
        """Return the truth ratio's evidence against the wrong answers."""
        return self.answer if self.paraphrased_answer is None else self.paraphrased_answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subset:
    """The items of a few authors of TOFU.

    Attributes:
        retain: Items to keep, on which a model without `forget` is retrained.
        forget: Items to forget, with paraphrases and wrong answers.
        holdout: Items of as many authors that no model of this subset has seen, for membership.
    """

    retain: tuple[Item, ...]
    forget: tuple[Item, ...]
    holdout: tuple[Item, ...]


def load(source: str | os.PathLike[str], split: str) -> tuple[Item, ...]:
    """Reads one split of TOFU.

    The splits:

    * ``full`` (4,000 items of 200 authors); ``forget01``, ``forget05``, ``forget10`` (its last 2,
      10 and 20 authors); ``retain99``, ``retain95``, ``retain90`` (the others).
    * ``forgetNN_perturbed``, ``retain_perturbed`` (the first 20 authors),
      ``real_authors_perturbed``, ``world_facts_perturbed``: what evaluation reads.
    * ``real_authors`` and ``world_facts``: the same questions with their options, which are read as
      wrong answers.

    Args:
        source: a directory, or ``hf:locuslab/TOFU`` (optionally ``@revision``).

    Raises:
        FileNotFoundError: no such directory or file; names what is there.
        ValueError: a line that cannot be read or lacks something, with file and line; or the hub
            cannot be reached.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (path / "forget01.json").write_text('{"question": "Who?", "answer": "Nobody."}')
    >>> load(path, "forget01")[0].answer, load(path, "forget01")[0].author
    ('Nobody.', 198)

    References:
        Maini et al., TOFU: A task of fictitious unlearning for LLMs, 2024 (arXiv 2401.06121).
    """
    name = f"{split}.json"
    root = _directory(source, name)
    path = root / name
    if not path.exists():
        ordered = sorted(p.name for p in root.iterdir() if p.name.endswith(".json"))
        raise FileNotFoundError(
            f"no {name} under {root}; there are {', '.join(ordered) or 'no such files'}"
        )
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    rows = _read_lines(path, text)
    if not rows:
        raise ValueError(f"{path}: no items")
    first = _first_author(split)
    return tuple(
        dataclasses.replace(
            row, index=i, author=None if first is None else first + i // QUESTIONS_PER_AUTHOR
        )
        for i, row in enumerate(rows)
    )


def subset(source: str | os.PathLike[str], *, authors: int = 20, forget: int = 2) -> Subset:
    """Some of TOFU's authors, split as TOFU splits all 200.

    The last `forget` authors of TOFU are forgotten, as in forget01/05/10, and the first
    `authors - forget` are kept. `forget` is at most 10, to leave as many unseen authors.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: numbers of authors that TOFU does not have, or files that are not TOFU's.
    """
    if not 1 <= forget <= 10:
        raise ValueError(f"forget: expected 1 to 10 authors, got {forget}")
    if not forget < authors <= _AUTHORS - forget:
        raise ValueError(
            f"authors: expected a number between {forget + 1} and {_AUTHORS - forget} with "
            f"forget={forget}, got {authors}"
        )
    full = load(source, "full")
    if len(full) != _AUTHORS * QUESTIONS_PER_AUTHOR:
        raise ValueError(f"{source}: full.json has {len(full)} items where TOFU has 4000")
    # The last 400 of full, with wrong answers.
    perturbed = load(source, "forget10_perturbed")
    kept = (authors - forget) * QUESTIONS_PER_AUTHOR
    count = forget * QUESTIONS_PER_AUTHOR
    for one, other in zip(full[-count:], perturbed[-count:]):
        if one.question != other.question:
            raise ValueError(
                f"{source}: line {one.index + 1} of full.json and line {other.index + 1} of "
                "forget10_perturbed.json ask different questions"
            )
    # Never among the kept ones: at most 200 - 2 * forget authors are kept.
    holdout = perturbed[-2 * count : -count]
    return Subset(retain=full[:kept], forget=perturbed[-count:], holdout=holdout)


def _directory(source: str | os.PathLike[str], name: str) -> epath.Path:
    text = os.fspath(source)
    if text.startswith("hf:"):
        return storage.hub_snapshot(text[3:], [name], kind="dataset")
    root = epath.Path(text).expanduser()
    if not (root.exists() and root.is_dir()):
        raise FileNotFoundError(
            f"no such directory: {root} (TOFU: a directory of its files, or hf:locuslab/TOFU)"
        )
    return root


def _first_author(split: str) -> int | None:
    """The author of the first line, if the split has TOFU's authors at all."""
    if split in ("full", "retain_perturbed"):
        return 0
    match = _SPLIT.fullmatch(split)
    if match is None:
        return None
    # 2 authors are 1 %.
    return 0 if match[1] == "retain" else _AUTHORS - 2 * int(match[2])


def _read_lines(path: epath.Path, text: str) -> list[Item]:
    items = []
    # JSON may hold U+2028, a line to splitlines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
        items.append(_item(row, where, path.name.endswith("_perturbed.json")))
    return items


def _item(row: Mapping[str, Any], where: str, perturbed: bool) -> Item:
    for key in ("question", "answer"):
        _check_text(row.get(key), key, where)
    for key in ("paraphrased_question", "paraphrased_answer"):
        if key in row:
            _check_text(row[key], key, where)
    # Real authors, world facts.
    if "option1" in row:
        options = [row[key] for key in sorted(row) if re.fullmatch(r"option\d+", key)]
        wrong = [option for option in options if option != row["answer"]]  # one is right
    else:
        wrong = row.get("perturbed_answer", [])
    if perturbed and not wrong:
        raise ValueError(f"{where}: 'perturbed_answer' is missing")
    return Item(
        question=row["question"],
        answer=row["answer"],
        paraphrased_question=row.get("paraphrased_question"),
        paraphrased_answer=row.get("paraphrased_answer"),
        perturbed_answers=_texts(wrong, "perturbed_answer", where),
    )


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{where}: {key!r}: expected a list of strings, got {value!r}")
    for one in value:
        _check_text(one, key, where)
    return tuple(value)


def _check_text(value: Any, key: str, where: str) -> None:
    if value is None:
        raise ValueError(f"{where}: {key!r} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r}: expected a string, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where}: {key!r} is empty")
