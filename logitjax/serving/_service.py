"""What the endpoints share."""

import dataclasses

from logitjax.models import Tokenizer
from logitjax.serving._config import ServerConfig
from logitjax.serving._observed import Metrics
from logitjax.serving._policy import Disclosure
from logitjax.serving._scheduler import Scheduler
from logitjax.serving._schema import ServerLimits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """A model being served.

    Attributes:
        scheduler: Decodes.
        tokenizer: Of the model.
        vocab_size: Number of tokens of the model.
        end_ids: Tokens that end an answer.
        config: What it takes and reports.
        disclosure: Keeps to the policy.
        metrics: Where requests and tokens are counted.
    """

    scheduler: Scheduler
    tokenizer: Tokenizer
    vocab_size: int
    end_ids: tuple[int, ...]
    config: ServerConfig
    disclosure: Disclosure
    metrics: Metrics

    @property
    def limits(self) -> ServerLimits:
        return self.config.limits
