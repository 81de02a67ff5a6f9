"""Whether a student recognises an article's topic, asked for after its text."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.topics import topic_articles
from logitjax import distillation, models

# Tokens of an article with its question, and articles in a batch.
_LENGTH = 160
_BATCH = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topics:
    """Articles that are each followed by a question; the likeliest topic is the answer.

    Topics are told apart by their first tokens, so that an article is read once and not once a
    topic.

    Attributes:
        tokens: int32 `[articles, length]`, zeros behind the question.
        ends: int `[articles]`, the position of the question's last token.
        firsts: int `[topics]`, the first token of each topic, all different.
        labels: int `[articles]`, the right topics.
    """

    student: distillation.Student
    tokens: np.ndarray
    ends: np.ndarray
    firsts: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(
        cls, source: str, tokenizer: models.Tokenizer, student: distillation.Student, count: int
    ) -> "Topics":
        """Test articles of a source in a fixed order.

        Raises:
            ValueError: The source has no topics, or two of them begin with the same token.
        """
        names, rows = topic_articles(source, count)
        firsts = np.array([tokenizer.encode(f" {name}")[0] for name in names])
        if len(set(firsts.tolist())) < len(names):
            raise ValueError(f"topic_rows: two topics of {source} begin with the same token")
        tokens = np.zeros((len(rows), _LENGTH), np.int32)
        ends = np.zeros(len(rows), np.int32)
        question = tokenizer.encode("\nTopic:")
        for i, (text, _) in enumerate(rows):
            # The last position predicts nothing.
            ids = tokenizer.encode(text, add_bos=None)[: _LENGTH - 1 - len(question)] + question
            tokens[i, : len(ids)] = ids
            ends[i] = len(ids) - 1
        labels = np.array([label for _, label in rows])
        return cls(student=student, tokens=tokens, ends=ends, firsts=firsts, labels=labels)

    @functools.cached_property
    def _answer(self) -> Any:
        @jax.jit
        def answer(trained: Any, frozen: Any, tokens: Any, ends: Any) -> jax.Array:
            model = self.student.model(trained, frozen)
            columns = {
                "tokens": tokens,
                "positions": jnp.broadcast_to(jnp.arange(_LENGTH), tokens.shape),
                "segment_ids": jnp.ones_like(tokens),
            }
            hidden = distillation.hidden_states(model, columns, self.student.adapters(trained))
            last = hidden[jnp.arange(len(ends)), ends]
            return model.logits(last[:, None])[:, 0, self.firsts].argmax(-1)

        return answer

    def accuracy(self, params: Any) -> float:
        """Share of articles whose topic is likelier than the others."""
        items = [
            np.asarray(self._answer(params, self.student.frozen, tokens, ends))
            for tokens, ends in self._batches()
        ]
        return float(np.mean(np.concatenate(items)[: len(self.labels)] == self.labels))

    def _batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """All articles, the last batch filled up with its last one."""
        count = len(self.labels)
        places = np.minimum(np.arange(-(-count // _BATCH) * _BATCH), count - 1)
        return [(self.tokens[part], self.ends[part]) for part in places.reshape(-1, _BATCH)]
