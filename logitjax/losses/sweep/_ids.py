"""Single logits of a block by their ids, found by comparison: no gather, no scatter.

A TPU reads and writes single numbers one after another. So every row searches for its ids in order,
the smallest first: the remaining ids among some columns determine the next one, a comparison with
these columns finds it, and the loop ends when no row has any left. Few columns contain few of a
row's ids, so no id is compared with the whole vocabulary, and nothing is sorted.

`pick` and `place` are linear in the values they move, and each is the transpose of the other: the
loop, whose length depends on values, is never differentiated.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The id of a column that does not count.
NOWHERE = jnp.iinfo(jnp.int32).min
# Number of columns searched together, in whole rows of lanes.
_COLUMNS, _LANES = 8192, 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pick(together: int, logits: jax.Array, columns: jax.Array, ids: jax.Array) -> jax.Array:
    """The logits at `ids`; zero for ids that are not among the columns.

    `together` ids of a row are searched at a time, while a column is on chip. `columns`, `[block]`
    or `[1, block]` int32, are ascending, with `NOWHERE` for columns that do not count. `ids`,
    `[*batch, n]` int32, are in any order and may repeat. Logits are `[*batch, block]`.
    """

    def look(picked: jax.Array, start: Any, at: jax.Array) -> jax.Array:
        some = _cut(logits, start, at)

        def step(picked: jax.Array, id_: jax.Array) -> jax.Array:
            value = jnp.where(at == id_, some, 0.0).sum(-1, keepdims=True)
            return jnp.where(ids == id_, value, picked)

        return _each_id(together, ids, at, step, picked)

    # Not `zeros`: over a mesh it would not vary as the ids do.
    return _over_tiles(look, (ids * 0).astype(logits.dtype), columns)


def _pick_forward(together: int, logits: jax.Array, columns: jax.Array, ids: jax.Array) -> Any:
    return pick(together, logits, columns, ids), (logits, columns, ids)


def _pick_backward(together: int, saved: Any, cotangent: jax.Array) -> Any:
    logits, columns, ids = saved
    return place(together, jnp.zeros_like(logits), columns, ids, cotangent), None, None


pick.defvjp(_pick_forward, _pick_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def place(
    together: int, total: jax.Array, columns: jax.Array, ids: jax.Array, values: jax.Array
) -> jax.Array:
    """`total`, `[*batch, block]`, with `values` added at `ids`, both `[*batch, n]`."""

    def look(total: jax.Array, start: Any, at: jax.Array) -> jax.Array:
        def step(some: jax.Array, id_: jax.Array) -> jax.Array:
            value = jnp.where(ids == id_, values, 0.0).sum(-1, keepdims=True)
            return some + jnp.where(at == id_, value, 0.0)

        some = _each_id(together, ids, at, step, _cut(total, start, at))
        if some.shape == total.shape:
            return some
        return lax.dynamic_update_slice_in_dim(total, some, start, -1)

    return _over_tiles(look, total, columns)


def _place_forward(together: int, total: Any, columns: Any, ids: Any, values: Any) -> Any:
    return place(together, total, columns, ids, values), (columns, ids)


def _place_backward(together: int, saved: Any, cotangent: jax.Array) -> Any:
    columns, ids = saved
    return cotangent, None, None, pick(together, cotangent, columns, ids)


place.defvjp(_place_forward, _place_backward)


def _cut(x: jax.Array, start: Any, at: jax.Array) -> jax.Array:
    # A kernel has no slice with a dynamic start.
    return (
        x if x.shape[-1] == at.shape[-1] else lax.dynamic_slice_in_dim(x, start, at.shape[-1], -1)
    )


def _over_tiles(step: Callable[..., Any], carry: Any, columns: jax.Array) -> Any:
    """Run `step(carry, start, columns)` for a few of the columns after another."""
    size = columns.shape[-1]
    count = -(-size // _COLUMNS)
    if count == 1:
        return step(carry, 0, columns)
    width = -(-size // (count * _LANES)) * _LANES

    def tile(index: Any, carry: Any) -> Any:
        # The last group slides back, and skips columns of an earlier one.
        start = jnp.minimum(index * width, size - width)
        at = lax.dynamic_slice_in_dim(columns, start, width, -1)
        return step(carry, start, jnp.where(start + jnp.arange(width) < index * width, NOWHERE, at))

    return lax.fori_loop(0, count, tile, carry)


def _each_id(
    together: int, ids: jax.Array, at: jax.Array, step: Callable[..., Any], carry: Any
) -> Any:
    """Run `step(carry, id)` with ids in order, `[*batch, 1]`; an exhausted row gives the end."""
    end = at.max() + 1
    first = jnp.where(at == NOWHERE, end, at).min()

    def following(least: jax.Array) -> jax.Array:
        return jnp.where((ids >= least) & (ids < end), ids, end).min(-1, keepdims=True)

    def some(state: Any) -> Any:
        id_, carry = state
        for _ in range(together):
            carry = step(carry, id_)
            id_ = following(id_ + 1)
        return id_, carry

    return lax.while_loop(lambda state: (state[0] < end).any(), some, (following(first), carry))[1]
