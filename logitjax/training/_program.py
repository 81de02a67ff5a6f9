"""Jitted programs that a run and a planner share.

Each experiment has `programs(config, mesh)`, which yields them with abstract arguments, the main
one first. The run calls the same programs on arrays.
"""

import dataclasses
import typing
from typing import Any

import jax


@typing.runtime_checkable
class Traceable(typing.Protocol):
    """A function that can be traced without running: `jax.jit(f)` or a `training.TrainStep`."""

    def trace(self, *arguments: Any, **options: Any) -> jax.stages.Traced: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A jitted program of a run.

    Attributes:
        name: Description of the program.
        jitted: The function, as the run calls it.
        arguments: Abstract positional arguments, with the shardings of the run.
        options: Keyword arguments, such as static ones.
        calls: Maximum number of calls in a run; 0 if the run decides.
        kept: Number of calls whose outputs are on disk at the end.
    """

    name: str
    jitted: Traceable
    arguments: tuple[Any, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    calls: float = 0.0
    kept: float = 0.0

    def trace(self) -> jax.stages.Traced:
        """The program with its jaxpr, ready to be lowered and compiled; nothing is computed.

        >>> import jax.numpy as jnp
        >>> row = jax.ShapeDtypeStruct((3,), jnp.float32)
        >>> twice = Program(name="twice", jitted=jax.jit(lambda x: 2 * x), arguments=(row,))
        >>> twice.trace().out_info.shape
        (3,)
        """
        return self.jitted.trace(*self.arguments, **self.options)
