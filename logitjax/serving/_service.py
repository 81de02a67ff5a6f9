"""What the endpoints share."""

import dataclasses
from concurrent.futures import Executor

from logitjax.models import Tokenizer
from logitjax.serving._accounts import Accounts
from logitjax.serving._config import ServerConfig
from logitjax.serving._formats import Formats
from logitjax.serving._names import TokenNames
from logitjax.serving._observed import Metrics
from logitjax.serving._policy import Disclosure
from logitjax.serving._scheduler import Scheduler
from logitjax.serving._schema import ServerLimits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """A model being served.

    Attributes:
        scheduler: Decodes.
        tokenizer: Tokenizer of the model.
        names: What its tokens are called.
        vocab_size: Number of tokens of the model.
        end_ids: Tokens that end an answer.
        config: What it takes and reports.
        disclosure: Keeps to the policy.
        metrics: Where requests and tokens are counted.
        accounts: What keys have spent.
        readers: Threads that read requests.
        formats: What holds answers to schemas.
        most_characters: More than so many cannot fit the model, whatever they are.
    """

    scheduler: Scheduler
    tokenizer: Tokenizer
    names: TokenNames
    vocab_size: int
    end_ids: tuple[int, ...]
    config: ServerConfig
    disclosure: Disclosure
    metrics: Metrics
    accounts: Accounts
    readers: Executor
    formats: Formats
    most_characters: int

    @property
    def limits(self) -> ServerLimits:
        return self.config.limits
