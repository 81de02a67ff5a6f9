"""Fields of configurations that are no part of what a run makes."""

import dataclasses
from typing import Any


def option(default: Any, *, execution: bool = False, secret: bool = False) -> Any:
    """A field of a dataclass whose fields are options, with a mark.

    Args:
        default: Its default.
        execution: Whether it says how a run executes, and not what its result is: a folder may be
            continued with another value.
        secret: Whether it is a key or a password: it is written to no file, and a folder may be
            continued with another one.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Loop:
    ...     log_every: int = option(10, execution=True)
    >>> Loop().log_every
    10
    """
    return dataclasses.field(default=default, metadata={"execution": execution, "secret": secret})
