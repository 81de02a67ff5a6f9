"""Whether a student knows what an article is about: its topic, asked for after the text."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax import data, distillation, losses, models

# Tokens of an article with its topic.
_LENGTH = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topics:
    """Articles, each followed by every topic; the likeliest one is the answer.

    Attributes:
        student: Who answers.
        tokens: int32 `[articles, topics, length]`.
        answers: bool of the same shape, the tokens of the topic.
        labels: int `[articles]`, the right ones.
    """

    student: distillation.Student
    tokens: np.ndarray
    answers: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(
        cls,
        source: str,
        tokenizer: models.Tokenizer,
        student: distillation.Student,
        count: int,
    ) -> "Topics":
        """The first test articles of a source.

        Raises:
            ValueError: The source has no topics.
        """
        test = data.load_examples(source, split="test")
        if "topic" not in test[0]:
            raise ValueError(f"topic_rows: expected data with topics, {source} has none")
        order = np.random.default_rng(0).permutation(len(test))
        rows = [test[int(i)] for i in order[:count]]
        names = sorted({test[i]["topic"] for i in range(len(test))})
        tokens = np.zeros((len(rows), len(names), _LENGTH), np.int32)
        answers = np.zeros(tokens.shape, bool)
        for i, row in enumerate(rows):
            for j, name in enumerate(names):
                end = tokenizer.encode("\nTopic:")
                topic = tokenizer.encode(f" {name}")
                text = tokenizer.encode(row["text"], add_bos=True)
                ids = text[: _LENGTH - len(end) - len(topic)] + end + topic
                tokens[i, j, : len(ids)] = ids
                answers[i, j, len(ids) - len(topic) : len(ids)] = True
        labels = np.array([names.index(row["topic"]) for row in rows])
        return cls(student=student, tokens=tokens, answers=answers, labels=labels)

    @functools.cached_property
    def _nll(self) -> Any:
        @jax.jit
        def nll(trained: Any, frozen: Any, tokens: Any, answers: Any) -> jax.Array:
            columns = {
                "tokens": tokens,
                "positions": jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape),
                "segment_ids": jnp.ones_like(tokens),
            }
            model = self.student.model(trained, frozen)
            hidden = distillation.hidden_states(model, columns, self.student.adapters(trained))
            loss = losses.linear_cross_entropy(hidden, model.head_of(), tokens[:, 1:])
            return jnp.where(answers[:, 1:], loss, 0.0).sum(-1)

        return nll

    def accuracy(self, params: Any) -> float:
        """Share of articles whose topic is likelier than the others."""
        right = 0
        for tokens, answers, label in zip(self.tokens, self.answers, self.labels, strict=True):
            found = np.asarray(self._nll(params, self.student.frozen, tokens, answers))
            right += int(found.argmin()) == label
        return right / len(self.labels)
