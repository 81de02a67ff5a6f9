"""State that the endpoints share."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """A served model: its decoder, its policy, and its accounts."""

    scheduler: Scheduler
    tokenizer: Tokenizer
    names: TokenNames
    vocab_size: int
    end_ids: tuple[int, ...]
    config: ServerConfig
    disclosure: Disclosure
    metrics: Metrics
    accounts: Accounts
    # Threads for requests: long prompts take long to check and to encode.
    readers: Executor
    formats: Formats
    # A longer prompt cannot fit, whatever its tokens are.
    most_characters: int
