"""Text to train and score on, and questions whose answer is a single token."""

import dataclasses
import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from logitjax import data
from logitjax.models import Tokenizer
from logitjax.storage import digest


@dataclasses.dataclass(frozen=True)
class Text:
    """Packed rows of each split of one source."""

    packed: Mapping[str, data.PackedDataset]

    @property
    def fingerprint(self) -> str:
        return digest([self.packed[split].fingerprint for split in data.SPLITS])

    def batch(self, step: int, *, seed: int, size: int) -> dict[str, np.ndarray]:
        return dict(self.packed["train"].batch(step, seed=seed, batch_size=size)["model"])

    def scored(self, split: str, size: int) -> Iterator[dict[str, np.ndarray]]:
        """The rows of a split in an order that does not favour its beginning."""
        rows = self.packed[split]
        for step in range(max(1, len(rows) // size)):
            yield dict(rows.batch(step, seed=0, batch_size=size)["model"])


def load_text(spec: str, tokenizer: Tokenizer, *, seq_len: int, directory: epath.Path) -> Text:
    packed = data.pack_splits(
        spec, {"model": tokenizer}, seq_len=seq_len, on_error="raise", directory=directory
    )
    return Text(packed.splits)


@dataclasses.dataclass(frozen=True)
class Questions:
    """Rows that end just before the answer's first token.

    Attributes:
        tokens: int32 `[n, length]`, padded on the right.
        last: int32 `[n]`, the position that predicts the answer.
        answers: int32 `[n]`, token ids.
    """

    tokens: np.ndarray
    last: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, rows: Any) -> "Questions":
        return Questions(self.tokens[rows], self.last[rows], self.answers[rows])


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions of each split; `options` are the token ids that may be answers.

    `examples` are the tokens of answered questions, to stand before a question.
    """

    splits: Mapping[str, Questions]
    options: tuple[int, ...]
    examples: tuple[int, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest([self.splits[s].tokens for s in data.SPLITS], self.options)

    def batch(self, step: int, *, seed: int, size: int) -> dict[str, np.ndarray]:
        questions = self.splits["train"]
        per_epoch = max(1, len(questions) // size)
        epoch, location = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(questions))
        return dataclasses.asdict(questions[order[location * size : (location + 1) * size]])


def load_task(
    spec: str, tokenizer: Tokenizer, *, length: int, sizes: Mapping[str, int], shown: int = 0
) -> Task:
    """`topics:tfds:NAME`: articles whose `topic` is the answer; `letters`: a toy task.

    Args:
        length: tokens a question, prompt included.
        sizes: questions of each split.
        shown: number of answered questions to have at hand, the first ones of training.
    """
    kind, _, source = spec.partition(":")
    rows: dict[str, list[tuple[str, str, str]]]
    if kind == "letters":
        rows = {split: _letters(split, sizes[split]) for split in data.SPLITS}
    elif kind == "topics":
        rows = {}
        for split in data.SPLITS:
            examples = data.load_examples(source, split=split)
            order = np.random.default_rng(0).permutation(len(examples))[: sizes[split]]
            items = [examples[int(i)] for i in order]
            rows[split] = [(row["text"], "\nTopic:", " " + row["topic"]) for row in items]
    else:
        raise ValueError(f"task: expected topics:SOURCE or letters, got {spec!r}")
    answers = sorted({answer for split in data.SPLITS for _, _, answer in rows[split]})
    first = {answer: tokenizer.encode(answer)[0] for answer in answers}
    if len(set(first.values())) < len(first):
        raise ValueError(f"task: answers of {spec} share their first tokens: {first}")
    splits = {split: _questions(rows[split], tokenizer, first, length) for split in data.SPLITS}
    train, ids = splits["train"], []
    for number, (*_, answer) in enumerate(rows["train"][:shown]):
        tokens = train.tokens[number, : train.last[number] + 1].tolist()
        ids += [*tokens, *tokenizer.encode(f"{answer}\n\n")]
    return Task(splits, tuple(first.values()), tuple(ids))


def _questions(
    rows: Sequence[tuple[str, str, str]],
    tokenizer: Tokenizer,
    first: Mapping[str, int],
    length: int,
) -> Questions:
    tokens = np.zeros((len(rows), length), np.int32)
    last = np.zeros(len(rows), np.int32)
    for i, (text, question, _) in enumerate(rows):
        asked = tokenizer.encode(question)
        # The beginning of an article says most about its topic.
        existing = tokenizer.encode(text[: 12 * length], add_bos=None)
        ids = [*existing[: length - len(asked)], *asked]
        tokens[i, : len(ids)] = ids
        last[i] = len(ids) - 1
    return Questions(tokens, last, np.array([first[answer] for *_, answer in rows], np.int32))


def _letters(split: str, count: int) -> list[tuple[str, str, str]]:
    rng = random.Random(split)
    words = ["".join(rng.choices("abcd", k=4)) for _ in range(count)]
    return [(word, ":", word[0]) for word in words]
