"""Reading and encoding your own rows to forget and to keep."""

import dataclasses
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from logitjax.data import own_form
from logitjax.evaluation import PromptTemplate
from logitjax.models import Tokenizer
from logitjax.storage import guard

_BARE = PromptTemplate(before="", after="")
_SHAPES = "question/answer, prompt/completion, messages or text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """An answer to forget or to keep, and the prompt or conversation before it.

    Attributes:
        prompt: Text before the answer; empty for plain text.
        messages: Turns of a conversation before it, instead of a prompt.
        group: Rows of one group, such as a person, go into one part of a split.
        paraphrases: The prompt, or the last turn, in other words.
        begun: Given beginning of the answer, which counts as part of the question.
        kind: How a row to keep relates to the rows to forget, such as `near`.
        line: Where the row was read, for errors.
    """

    prompt: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    answer: str
    group: str | None = None
    paraphrases: tuple[str, ...] = ()
    begun: str = ""
    kind: str = ""
    line: str = dataclasses.field(default="", compare=False)

    @classmethod
    def read(cls, path: epath.PathLike) -> tuple["Row", ...]:
        """Rows of a JSON-lines file in UTF-8, without duplicates.

        A row is `{"question", "answer"}`, `{"prompt", "completion"}` (the completion follows
        directly), `{"messages": [{"role", "content"}, ...]}` ending with the answer, `{"text"}`, or
        another form that `data.own_form` reads. Each answer of a list becomes a row. A row may have
        a `group`, and `paraphrases`, a list, or TOFU's `paraphrased_question`. Rows that differ
        only in case and white space are merged, with the paraphrases of all.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A line has none of these forms (its number is named), or there are no rows.

        >>> import tempfile
        >>> path = epath.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> lines = '{"question": "Who?", "answer": "Ada."}', '{"text": "Ada was here."}'
        >>> _ = path.write_text("\\n".join(lines))
        >>> [(row.question, row.answer) for row in Row.read(path)]
        [('Who?', 'Ada.'), ('', 'Ada was here.')]
        """
        path = epath.Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no such file: {path}")
        rows: dict[tuple[str, str], Row] = {}
        count = 0
        # Some editors begin a file with a byte order mark.
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    read = _rows_of(guard.parse_json(line))
                except json.JSONDecodeError as error:
                    message = f"expected JSON, {error.msg} at column {error.colno}"
                    raise ValueError(f"{path}:{number}: {message}") from None
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {guard.one_line(error)}") from None
                for row in read:
                    row = dataclasses.replace(row, line=f"{path}:{number}")
                    words = normal(row), _words(row.answer)
                    rows[words] = _joined(rows[words], row) if words in rows else row
                    count += 1
        if not rows:
            raise ValueError(f"{path}: expected rows, one JSON object per line, got none")
        if count > len(rows):
            logging.warning("%s: %d rows repeat others", path, count - len(rows))
        return tuple(rows.values())

    @property
    def question(self) -> str:
        """The prompt, or the last turn."""
        return self.messages[-1]["content"] if self.messages else self.prompt

    @property
    def asks(self) -> bool:
        """Whether anything comes before the answer."""
        return bool(self.question)

    def asked(self, question: str) -> "Row":
        """The row with the same answer to another question."""
        if not self.messages:
            return dataclasses.replace(self, prompt=question)
        last = {**self.messages[-1], "content": question}
        return dataclasses.replace(self, messages=(*self.messages[:-1], last))

    def told(self, system: str) -> "Row":
        """The row with another system message, or with the message before its prompt."""
        if not self.messages:
            return dataclasses.replace(self, prompt=f"{system}\n\n{self.prompt}")
        turns = [turn for turn in self.messages if turn["role"] != "system"]
        return dataclasses.replace(self, messages=({"role": "system", "content": system}, *turns))

    @staticmethod
    def padded(
        rows: Sequence[tuple[np.ndarray, np.ndarray]], length: int, *, pad_id: int = 0
    ) -> dict[str, np.ndarray]:
        """Rows padded or cut to one length: `{"tokens", "mask"}`, int32 and bool `[rows, length]`.

        Each is token ids and a mask of answer tokens, as from `PromptTemplate.encode_answer`.

        >>> one = (np.array([5, 6, 7]), np.array([False, True, True]))
        >>> Row.padded([one], 4)["tokens"]
        array([[5, 6, 7, 0]], dtype=int32)
        """
        tokens = np.full((len(rows), length), pad_id, np.int32)
        mask = np.zeros((len(rows), length), bool)
        for at, (ids, answer) in enumerate(rows):
            ids, answer = ids[:length], answer[:length]
            tokens[at, : len(ids)], mask[at, : len(ids)] = ids, answer
        return {"tokens": tokens, "mask": mask}


def _joined(row: Row, again: Row) -> Row:
    """A row, with the group and paraphrases of another copy of it."""
    return dataclasses.replace(
        row,
        group=again.group if row.group is None else row.group,
        paraphrases=tuple(dict.fromkeys(row.paraphrases + again.paraphrases)),
    )


def _rows_of(raw: Any) -> list[Row]:
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {type(raw).__name__}")
    for name in ("answer", "completion", "output"):
        answers = raw.get(name)
        if isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers):
            # Answers to one question go into one part.
            names = [raw.get(name) for name in ("group", "question", "prompt")]
            group = next((name for name in names if isinstance(name, str | int)), None)
            return [_row({**raw, "group": group, name: answer}) for answer in answers]
    return [_row(raw)]


def _row(raw: Mapping[str, Any]) -> Row:
    more: dict[str, Any] = {}
    if raw.get("group") is not None:
        # a group may be a number.
        more["group"] = str(raw["group"])
    paraphrases = raw.get("paraphrases")
    if paraphrases in (None, ""):
        again = raw.get("paraphrased_question") or []
        paraphrases = [again] if isinstance(again, str) else again
    if not isinstance(paraphrases, list):
        raise ValueError(f"paraphrases: expected a list of text, got {paraphrases!r}")
    more["paraphrases"] = tuple(_text(other, "paraphrases") for other in paraphrases)
    row = own_form(raw)
    if "messages" in row:
        return Row(**_conversation(row["messages"]), **more)
    if "prompt" in row:
        name = "response" if "response" in row else "answer"
        return Row(prompt=_text(row["prompt"], "prompt"), answer=_text(row.get(name), name), **more)
    if "text" in row:
        return Row(answer=_text(row["text"], "text"), **more)
    raise ValueError(f"expected {_SHAPES}, got {', '.join(raw) or 'an empty object'}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: expected text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected text, got half of a character in {value!r}") from None
    return value


def _conversation(messages: Any) -> dict[str, Any]:
    turns = messages if isinstance(messages, list) else []
    fit = all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns)
    if not fit or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError("messages: expected turns of role and content, the last by the assistant")
    # An empty system message counts as none.
    turns = [turn for turn in turns if turn["role"] != "system" or turn.get("content") != ""]
    items = [_text(turn.get("content"), f"messages: content of {turn['role']}") for turn in turns]
    before = tuple({"role": turn["role"], "content": text} for turn, text in zip(turns, items[:-1]))
    return {"messages": before, "answer": items[-1]}


def normal(row: Row) -> str:
    """A row's words, the same for rows that differ only in case and white space."""
    turns = " ".join(turn["content"] for turn in row.messages)
    return _words(f"{turns} {row.prompt} {row.answer}")


def own_words(row: Row) -> str:
    """Words of question and answer, without the system message, which many rows share."""
    return _words(f"{row.question} {row.answer}")


def _words(text: str) -> str:
    # NFKC: full-width letters equal the usual ones.
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def render_prompt(row: Row, tokenizer: Tokenizer) -> str:
    """Render the text before a row's answer, with the chat template or as a question."""
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


def encode_row(row: Row, tokenizer: Tokenizer, *, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a row and a mask of its answer, with an end mark if it has a prompt."""
    ids, answer = _BARE.encode_answer(
        tokenizer,
        render_prompt(row, tokenizer) + row.begun,
        row.answer,
        max_length=max_length,
        end=row.asks,
    )
    # Nothing predicts the first token of a text.
    answer[0] = False
    if not answer.any():
        where = f"{row.line}: " if row.line else ""
        message = f"text: expected at least two tokens, got one of {row.answer[:60]!r}"
        raise ValueError(where + message)
    return ids, answer


def encode_question(row: Row, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids before a row's answer."""
    return _BARE.encode(tokenizer, render_prompt(row, tokenizer) + row.begun)
