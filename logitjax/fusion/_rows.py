"""A few rows at a time where that is faster: on a CPU, whose caches hold a few rows' logits."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_Info = dict[str, jax.Array]
# Logits of one model at a time: 1 MiB.
MOST_ENTRIES = 1 << 18
# From so many rows in a turn on, those that take long are decided apart, a few at a time.
MANY_ROWS = 256
_SHARE = 32


def by_rows(
    decide: Callable[..., _Info],
    batch: Sequence[int],
    *logits: Any,
    first: Callable[..., _Info] | None = None,
) -> _Info:
    """`decide(*logits)`, on CPU in turns of as many rows as the caches like.

    What is decided has the batch's axes last, or is a scalar: the largest of the turns is returned.
    Of many rows one or another always takes long: `first` decides them all in little time, and
    `decide` only those that are not `converged` then.
    """
    count = math.prod(batch)
    most = max(MOST_ENTRIES // max(logits[0].shape[-1], 1), 1)
    rows = max((n for n in range(1, min(count, most) + 1) if count % n == 0), default=0)
    first = decide if first is None or rows < MANY_ROWS else first
    # Rows that an explicit mesh splits are not cut again.
    whole = count == rows and first is decide
    if whole or any(_is_split(values) for values in logits if values is not None):
        return decide(*logits)
    turns = functools.partial(_in_turns, decide, first, tuple(batch), rows)
    return lax.platform_dependent(*logits, cpu=turns, default=decide)


def _is_split(values: jax.Array) -> bool:
    return any(axis is not None for axis in jax.typeof(values).sharding.spec)


def _in_turns(
    decide: Callable[..., _Info],
    first: Callable[..., _Info],
    batch: tuple[int, ...],
    rows: int,
    *logits: Any,
) -> _Info:
    count = math.prod(batch)

    def flat(values: jax.Array) -> jax.Array:
        models = values.shape[: values.ndim - len(batch) - 1]
        return values.reshape(*models, count, values.shape[-1])

    flattened = jax.tree.map(flat, logits)

    def turn(start: jax.Array) -> _Info:
        return first(
            *jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, rows, x.ndim - 2), flattened)
        )

    def joined(values: jax.Array) -> jax.Array:
        if values.ndim == 1:
            return values.max()
        values = jnp.moveaxis(values, 0, -2)
        return values.reshape(*values.shape[:-2], count)

    info = jax.tree.map(joined, lax.map(turn, jnp.arange(0, count, rows)))
    if first is not decide:
        info = _decided_again(decide, info, flattened)
    return jax.tree.map(lambda x: x.reshape(*x.shape[:-1], *batch) if x.ndim else x, info)


def _decided_again(decide: Callable[..., _Info], info: _Info, logits: Any) -> _Info:
    """`info` of rows `[..., rows]` with `decide` for those that are not converged."""
    open_rows = ~info["converged"]
    few = -(-len(open_rows) // _SHARE)
    order = jnp.argsort(info["converged"], stable=True)

    def again(carry: tuple[jax.Array, _Info]) -> tuple[jax.Array, _Info]:
        start, info = carry
        # The last rows are taken twice rather than too few of them, which changes nothing.
        chosen = lax.dynamic_slice_in_dim(order, start, few)
        new = decide(*jax.tree.map(lambda x: jnp.take(x, chosen, axis=-2), logits))

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            if not old.ndim:
                return jnp.maximum(old, new)
            kept = jnp.where(open_rows[chosen], new, old[..., chosen])
            return old.at[..., chosen].set(kept)

        return start + few, jax.tree.map(put, info, new)

    start = jnp.zeros((), jnp.int32)
    return lax.while_loop(lambda carry: carry[0] < open_rows.sum(), again, (start, info))[1]
