"""Rows of one's own to forget and to keep: read, split so that nothing leaks, encoded."""

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from logitjax.evaluation import PromptTemplate, encode_answer, encode_prompt
from logitjax.models import Tokenizer

_BARE = PromptTemplate(before="", after="")
_SHAPES = "question/answer, prompt/completion, messages or text"
# Words that two rows share in a run before they count as copies, and the share of such runs.
_GRAM, _ALIKE = 8, 0.5
_TRAIN, _VALIDATION = 0.6, 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """An answer to forget or to keep, and what comes before it.

    Attributes:
      prompt: Text before the answer; empty for plain text.
      messages: Turns of a conversation before it, in place of a prompt.
      answer: What is forgotten or kept.
      group: Rows of one group, such as a person, come into one part of a split.
      paraphrases: The prompt, or the last turn, in other words.
    """

    prompt: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    answer: str
    group: str | None = None
    paraphrases: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The prompt, or the last turn."""
        return self.messages[-1]["content"] if self.messages else self.prompt

    @property
    def asks(self) -> bool:
        """Whether there is anything before the answer."""
        return bool(self.question)

    def asked(self, question: str) -> "Row":
        """The same answer to another question."""
        if not self.messages:
            return dataclasses.replace(self, prompt=question)
        last = {**self.messages[-1], "content": question}
        return dataclasses.replace(self, messages=(*self.messages[:-1], last))


def read_rows(path: epath.PathLike) -> tuple[Row, ...]:
    """Rows of a JSON-lines file, without those that are there twice.

    A row is `{"question", "answer"}`, `{"prompt", "completion"}` (the completion follows as it is),
    `{"messages": [{"role", "content"}, ...]}` that end with the answer, or `{"text"}`; it may have
    a `group` and `paraphrases`, a list.

    Args:
      path: The file.

    Returns:
      The rows, in order.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: A line is none of these, with its number; or the file has no rows.

    >>> import tempfile
    >>> path = epath.Path(tempfile.mkdtemp()) / "rows.jsonl"
    >>> _ = path.write_text('{"question": "Who?", "answer": "Ada."}\\n{"text": "Ada was here."}\\n')
    >>> [(row.question, row.answer) for row in read_rows(path)]
    [('Who?', 'Ada.'), ('', 'Ada was here.')]
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_text().split("\n"), start=1):
        if line.strip():
            row = _row(line, f"{path}:{number}")
            rows.setdefault(_normal(row), row)
    if not rows:
        raise ValueError(f"{path}: expected rows, a JSON object a line, got none")
    return tuple(rows.values())


def _row(line: str, where: str) -> Row:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected JSON, {error.msg} at column {error.colno}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected an object, got {type(raw).__name__}")

    def text(name: str) -> str:
        if not isinstance(raw.get(name), str) or not raw[name].strip():
            raise ValueError(f"{where}: {name}: expected text, got {raw.get(name)!r}")
        return raw[name]

    more: dict[str, Any] = {}
    if raw.get("group") is not None:
        more["group"] = str(raw["group"])
    paraphrases = raw.get("paraphrases") or ()
    if isinstance(paraphrases, str) or not all(isinstance(p, str) for p in paraphrases):
        raise ValueError(f"{where}: paraphrases: expected a list of text, got {paraphrases!r}")
    more["paraphrases"] = tuple(paraphrases)
    if "messages" in raw:
        return Row(**_conversation(raw["messages"], where), **more)
    if "question" in raw:
        turn = {"role": "user", "content": text("question")}
        return Row(messages=(turn,), answer=text("answer"), **more)
    if "prompt" in raw:
        name = "completion" if "completion" in raw else "answer"
        return Row(prompt=text("prompt"), answer=text(name), **more)
    if "text" in raw:
        return Row(answer=text("text"), **more)
    raise ValueError(f"{where}: expected {_SHAPES}, got {', '.join(raw) or 'an empty object'}")


def _conversation(messages: Any, where: str) -> dict[str, Any]:
    turns = messages if isinstance(messages, list) else []
    fit = all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not fit or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: messages: expected turns of role and content, the last by the assistant"
        )
    before = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns[:-1])
    return {"messages": before, "answer": turns[-1]["content"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Rows by what they are for.

    Attributes:
      forget: What is to go; all of it is trained on.
      reworded: The same in other words, for choosing; empty without paraphrases.
      reworded_test: Those that are asked at the end alone.
      train: Rows to keep that are trained on.
      validation: Rows to keep that settings are chosen by.
      test: Rows to keep that are asked at the end alone.
      holdout: Of the kind of `forget`, never trained on by anybody.
      left_out: How many rows to keep or of the holdout are linked to rows to forget.
      groups: How many groups `train`, `validation` and `test` have.
    """

    forget: tuple[Row, ...]
    reworded: tuple[Row, ...]
    reworded_test: tuple[Row, ...]
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    holdout: tuple[Row, ...]
    left_out: int
    groups: tuple[int, int, int]


def split_rows(
    forget: Sequence[Row],
    retain: Sequence[Row],
    holdout: Sequence[Row] = (),
    *,
    seed: int = 0,
) -> Split:
    """Split rows so that what is chosen by, and what is reported, was not trained on.

    Rows are linked that have one `group`, or half of whose runs of eight words are the same; linked
    rows come into one part. What is linked to a row to forget is left out of the others. Groups are
    put in an order by a hash of the seed and their text, and cut after 60 and 80 % of the rows.

    Args:
      forget: Rows to forget.
      retain: Rows to keep.
      holdout: Rows like those to forget that no model was trained on.
      seed: Of the order.

    Returns:
      The `Split`.

    Raises:
      ValueError: Fewer than three groups of rows to keep are left.

    >>> keep = [Row(prompt=f"{n}?", answer="yes") for n in range(10)]
    >>> split = split_rows([Row(prompt="a?", answer="b")], keep)
    >>> len(split.train), len(split.validation), len(split.test)
    (6, 2, 2)
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
    ordered = sorted(members.values(), key=lambda rows: _hash(seed, min(map(_normal, rows))))
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
    by_hash = sorted(again, key=lambda row: _hash(seed, _normal(row)))
    half = -(-len(by_hash) // 2)

    def reworded(rows: Sequence[Row]) -> tuple[Row, ...]:
        return tuple(row.asked(text) for row in rows for text in row.paraphrases)

    return Split(
        forget=tuple(forget),
        reworded=reworded(by_hash[:half]),
        reworded_test=reworded(by_hash[half:]),
        train=tuple(parts[0]),
        validation=tuple(parts[1]),
        test=tuple(parts[2]),
        holdout=tuple(unseen),
        left_out=len(retain) - len(kept) + len(holdout) - len(unseen),
        groups=(counts[0], counts[1], counts[2]),
    )


def _groups(rows: Sequence[Row]) -> list[int]:
    """A number for each row, the same for rows that are linked."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    named: dict[str, int] = {}
    grams = [_grams(_normal(row)) for row in rows]
    seen: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if row.group is not None:
            parent[root(i)] = root(named.setdefault(row.group, i))
        others: dict[int, int] = {}
        for gram in grams[i]:
            for j in seen.setdefault(gram, []):
                others[j] = others.get(j, 0) + 1
            seen[gram].append(i)
        for j, both in others.items():
            if both >= _ALIKE * (len(grams[i]) + len(grams[j]) - both):
                parent[root(i)] = root(j)
    return [root(i) for i in range(len(rows))]


def _normal(row: Row) -> str:
    turns = " ".join(turn["content"] for turn in row.messages)
    text = unicodedata.normalize("NFKC", f"{turns} {row.prompt} {row.answer}").lower()
    return " ".join(text.split())


def _grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return {tuple(words[i : i + _GRAM]) for i in range(max(1, len(words) - _GRAM + 1))}


def _hash(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest()


def render_prompt(row: Row, tokenizer: Tokenizer, *, system: str | None = None) -> str:
    """What a model reads before a row's answer.

    Conversations are rendered by the tokenizer's chat template. Without one, a single question
    becomes `Question: ...` and `Answer: `.

    Args:
      row: The row.
      tokenizer: Of the model.
      system: A first message, for rows of turns.

    Raises:
      ValueError: A conversation of several turns, and a tokenizer without a template.
    """
    if not row.messages:
        return row.prompt
    messages = [dict(turn) for turn in row.messages]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    if tokenizer.chat_template is not None:
        return tokenizer.render_chat(messages, add_generation_prompt=True)
    if len(row.messages) > 1:
        raise ValueError("messages: expected one turn for a tokenizer without a chat template")
    before = "" if system is None else system + "\n"
    return before + PromptTemplate.phi().render(row.question)


def encode_row(
    row: Row, tokenizer: Tokenizer, *, max_length: int, system: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a row and which of them are the answer's, with an end mark if it has a prompt.

    Raises:
      ValueError: The prompt alone takes `max_length` tokens.
    """
    ids, answer = encode_answer(
        tokenizer,
        _BARE,
        render_prompt(row, tokenizer, system=system),
        row.answer,
        max_length=max_length,
        end=row.asks,
    )
    answer[0] = False  # nothing predicts the first token of a text
    return ids, answer


def encode_question(row: Row, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids that a row's answer continues."""
    return encode_prompt(tokenizer, _BARE, render_prompt(row, tokenizer))


def padded_rows(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], length: int, *, pad_id: int = 0
) -> dict[str, np.ndarray]:
    """Rows of one length, padded at the end: what losses of this package take.

    Args:
      rows: Token ids and which of them are answers', as from `evaluation.encode_answer`.
      length: Of every row; the rest is cut off.
      pad_id: Any id the model has.

    Returns:
      `{"tokens", "mask"}`, int32 and bool `[rows, length]`.

    >>> one = (np.array([5, 6, 7]), np.array([False, True, True]))
    >>> padded_rows([one], 4)["tokens"]
    array([[5, 6, 7, 0]], dtype=int32)
    """
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for at, (ids, answer) in enumerate(rows):
        ids, answer = ids[:length], answer[:length]
        tokens[at, : len(ids)], mask[at, : len(ids)] = ids, answer
    return {"tokens": tokens, "mask": mask}
