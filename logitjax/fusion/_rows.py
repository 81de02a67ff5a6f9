"""Process a few rows at a time on CPUs, whose caches hold a few rows' logits."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_Info = dict[str, jax.Array]
# Size of one model's logits at a time: 1 MiB.
MOST_ENTRIES = 1 << 18


def by_rows(decide: Callable[..., _Info], batch: Sequence[int], *logits: Any) -> _Info:
    """Compute `decide(*logits)`, on CPUs in groups of as many rows as fit the caches."""
    # Decisions have the batch axes last, or are scalars: then the largest is returned.
    count = math.prod(batch)
    most = max(MOST_ENTRIES // max(logits[0].shape[-1], 1), 1)
    rows = max((n for n in range(1, min(count, most) + 1) if count % n == 0), default=0)
    # Rows that an explicit mesh splits are not cut again.
    specs = [jax.typeof(values).sharding.spec for values in logits if values is not None]
    if count == rows or any(axis is not None for spec in specs for axis in spec):
        return decide(*logits)
    turns = functools.partial(_in_turns, decide, tuple(batch), rows)
    return lax.platform_dependent(*logits, cpu=turns, default=decide)


def _in_turns(
    decide: Callable[..., _Info], batch: tuple[int, ...], rows: int, *logits: Any
) -> _Info:
    count = math.prod(batch)

    def flat(values: jax.Array) -> jax.Array:
        return values.reshape(*values.shape[: -len(batch) - 1], count, values.shape[-1])

    flattened = jax.tree.map(flat, logits)

    def turn(start: jax.Array) -> _Info:
        return decide(
            *jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, rows, x.ndim - 2), flattened)
        )

    def joined(values: jax.Array) -> jax.Array:
        if values.ndim == 1:
            return values.max()
        values = jnp.moveaxis(values, 0, -2)
        return values.reshape(*values.shape[:-2], count)

    info = jax.tree.map(joined, lax.map(turn, jnp.arange(0, count, rows)))
    return jax.tree.map(lambda x: x.reshape(*x.shape[:-1], *batch) if x.ndim else x, info)
