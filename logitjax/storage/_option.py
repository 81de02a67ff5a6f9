"""Fields of configurations, with what their types do not say."""

import dataclasses
from collections.abc import Sequence
from typing import Any


def option(
    default: Any, *, choices: Sequence[str] = (), execution: bool = False, secret: bool = False
) -> Any:
    """A field of a dataclass whose fields are options, with marks that commands read.

    Args:
        default: Its default.
        choices: All its values, for text that has no narrower type.
        execution: It says how a run executes; a folder may be continued with another value.
        secret: A key or a password: written to no file; a folder may be continued with another.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Loop:
    ...     log_every: int = option(10, execution=True)
    >>> Loop().log_every
    10
    """
    metadata = {"choices": choices, "execution": execution, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata)
