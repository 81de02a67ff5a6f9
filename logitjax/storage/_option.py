"""Fields of configurations, with properties that their types do not express."""

import dataclasses
from collections.abc import Sequence
from typing import Any


def option(
    default: Any, *, choices: Sequence[str] = (), execution: bool = False, secret: bool = False
) -> Any:
    """A field of a dataclass of options, with marks that commands read.

    Args:
        default: Its default.
        choices: The allowed values of text without a narrower type.
        execution: It only affects how a run executes; a folder may be continued with another.
        secret: A key or a password, written to no file; a folder may be continued with another.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Loop:
    ...     log_every: int = option(10, execution=True)
    >>> Loop().log_every
    10
    """
    metadata = {"choices": choices, "execution": execution, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata)
