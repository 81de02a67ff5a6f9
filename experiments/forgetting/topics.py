"""General knowledge beside the rows: the topic of an article, asked for after its text."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.shared.topics import topic_articles
from logitjax import decoding, models
from logitjax.unlearning import Deployed

_LENGTH = 160
# Larger than any difference of two logits.
_ALLOWED = 1e3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topics:
    """Articles, and each topic's first token, by which topics are told apart.

    Attributes:
        prompts: Token ids of each article and the question after it.
        labels: int `[articles]`, the right topics.
        firsts: The first token of each topic.
    """

    prompts: Sequence[Sequence[int]]
    labels: np.ndarray
    firsts: Sequence[int]

    @classmethod
    def load(cls, source: str, tokenizer: models.Tokenizer, count: int) -> "Topics":
        """Test articles of a source in a fixed order.

        Raises:
            ValueError: The source has no topics, or two of them begin with the same token.
        """
        names, articles = topic_articles(source, count)
        firsts = [tokenizer.encode(f" {name}")[0] for name in names]
        if len(set(firsts)) < len(firsts):
            raise ValueError(f"topics: expected first tokens that differ, got {names}")
        question = tokenizer.encode("\nTopic:")
        room = _LENGTH - len(question)
        prompts = [tokenizer.encode(text, add_bos=None)[:room] + question for text, _ in articles]
        return cls(prompts=prompts, labels=np.asarray([n for _, n in articles]), firsts=firsts)

    def accuracy(self, model: Deployed, *, batch_size: int) -> float:
        """The share of articles whose topic has the likeliest first token."""
        line_up, result = model.line_up(), []
        for start in range(0, len(self.prompts), batch_size):
            prompts = list(self.prompts[start : start + batch_size])
            out = decoding.generate(
                line_up,
                prompts + prompts[-1:] * (batch_size - len(prompts)),
                max_new_tokens=1,
                logit_bias=dict.fromkeys(self.firsts, _ALLOWED),
            )
            result += [self.firsts.index(int(ids[0])) for ids in out.rows()[: len(prompts)]]
        return float(np.mean(np.asarray(result) == self.labels))
