"""What a model knows beside the rows: the topic of an article, asked for after its text."""

import dataclasses

import numpy as np

from experiments.shared.topics import topic_articles
from logitjax import models
from logitjax.evaluation import score_rows
from logitjax.unlearning import Deployed

_LENGTH = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topics:
    """Articles, each once with every topic behind it; the likeliest one is the answer.

    Attributes:
        rows: Token ids and which of them are the topic's, all topics of an article together.
        labels: int `[articles]`, the right ones.
        count: Of topics.
    """

    rows: list[tuple[np.ndarray, np.ndarray]]
    labels: np.ndarray
    count: int

    @classmethod
    def load(cls, source: str, tokenizer: models.Tokenizer, count: int) -> "Topics":
        """Test articles of a source in an order that is always the same.

        Raises:
            ValueError: The source has no topics.
        """
        names, articles = topic_articles(source, count)
        answers = [tokenizer.encode(f" {name}") for name in names]
        question = tokenizer.encode("\nTopic:")
        room = _LENGTH - len(question) - max(map(len, answers))
        rows, labels = [], []
        for text, label in articles:
            before = tokenizer.encode(text, add_bos=None)[:room] + question
            for answer in answers:
                ids = np.asarray(before + answer, np.int32)
                rows.append((ids, np.arange(len(ids)) >= len(before)))
            labels.append(label)
        return cls(rows=rows, labels=np.asarray(labels), count=len(names))

    def accuracy(self, model: Deployed, *, batch_size: int, pad_id: int) -> float:
        """The share of articles whose topic is the likeliest one, a token."""
        scores = score_rows(model.nll, self.rows, batch_size=batch_size, pad_id=pad_id)
        averages = (scores.totals() / scores.counts()).reshape(-1, self.count)
        return float((averages.argmin(axis=1) == self.labels).mean())
