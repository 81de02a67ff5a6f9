"""Rows of one's own to forget and to keep: read and encoded."""

import dataclasses
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from logitjax.evaluation import PromptTemplate, encode_answer, encode_prompt
from logitjax.models import Tokenizer

_BARE = PromptTemplate(before="", after="")
_SHAPES = "question/answer, prompt/completion, messages or text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """An answer to forget or to keep, and what comes before it.

    Attributes:
      prompt: Text before the answer; empty for plain text.
      messages: Turns of a conversation before it, in place of a prompt.
      answer: The answer to forget or to keep.
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
        """The row with the same answer to another question."""
        if not self.messages:
            return dataclasses.replace(self, prompt=question)
        last = {**self.messages[-1], "content": question}
        return dataclasses.replace(self, messages=(*self.messages[:-1], last))

    def told(self, system: str) -> "Row":
        """The row with another system message."""
        turns = [turn for turn in self.messages if turn["role"] != "system"]
        return dataclasses.replace(self, messages=({"role": "system", "content": system}, *turns))


def read_rows(path: epath.PathLike) -> tuple[Row, ...]:
    """Rows of a JSON-lines file, without duplicates.

    A row is `{"question", "answer"}`, `{"prompt", "completion"}` (the completion follows as it is),
    `{"messages": [{"role", "content"}, ...]}` that end with the answer, or `{"text"}`. It may have
    a `group`, and `paraphrases`, a list.

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
            rows.setdefault(normal(row), row)
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


def normal(row: Row) -> str:
    """A row's words, the same for rows that differ in case and white space alone."""
    turns = " ".join(turn["content"] for turn in row.messages)
    text = unicodedata.normalize("NFKC", f"{turns} {row.prompt} {row.answer}").lower()
    return " ".join(text.split())


def render_prompt(row: Row, tokenizer: Tokenizer) -> str:
    """What a model reads before a row's answer.

    Conversations are rendered by the tokenizer's chat template. Without one, a question becomes
    `Question: ...` and `Answer: `, after what the system says.

    Raises:
      ValueError: A conversation of several turns, and a tokenizer without a template.
    """
    if not row.messages:
        return row.prompt
    messages = [dict(turn) for turn in row.messages]
    if tokenizer.chat_template is not None:
        return tokenizer.render_chat(messages, add_generation_prompt=True)
    *before, last = messages
    if any(turn["role"] != "system" for turn in before):
        raise ValueError("messages: expected one turn for a tokenizer without a chat template")
    system = "".join(turn["content"] + "\n" for turn in before)
    return system + PromptTemplate.phi().render(last["content"])


def encode_row(
    row: Row, tokenizer: Tokenizer, *, max_length: int, begun: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a row and which of them are the answer's, with an end mark if it has a prompt.

    What the answer was `begun` with counts as its prompt.

    Raises:
      ValueError: The prompt alone takes `max_length` tokens.
    """
    ids, answer = encode_answer(
        tokenizer,
        _BARE,
        render_prompt(row, tokenizer) + begun,
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
    """Rows of one length, padded at the end, as losses of this package take them.

    Args:
      rows: Token ids and which of them are answers', as from `evaluation.encode_answer`.
      length: Length of every row; the rest is cut off.
      pad_id: Any id of the vocabulary.

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
