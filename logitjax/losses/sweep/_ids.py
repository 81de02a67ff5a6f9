"""Select logits of a block by id, by comparison instead of gather and scatter.

A TPU gathers and scatters one number at a time. So every row visits its ids among a few columns in
order, smallest first: the remaining ids give the next one, a comparison with the columns locates
it, and the loop ends when no row has any left. Few columns hold few of a row's ids, so no id is
compared with the whole vocabulary, and nothing is sorted.

`pick` and `place` are linear in the values, and each is the transpose of the other: the loop, whose
length depends on values, is never differentiated.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Id of a column that does not count.
NOWHERE = jnp.iinfo(jnp.int32).min
# Number of columns searched together, in whole rows of lanes.
_COLUMNS, _LANES = 8192, 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pick(together: int, logits: jax.Array, columns: jax.Array, ids: jax.Array) -> jax.Array:
    """Pick the logits at `ids`; zero for ids that are not among the columns.

    `together` ids of a row are searched at a time, while a column is on chip. `columns`, `[block]`
    or `[1, block]` int32, ascend, `NOWHERE` if one does not count. `ids`, `[*batch, n]` int32, are
    in any order and may repeat. Logits are `[*batch, block]`.
    """

    def look(picked: jax.Array, start: Any, at: jax.Array) -> jax.Array:
        some = _cut(logits, start, at)

        def step(picked: jax.Array, id_: jax.Array) -> jax.Array:
            value = jnp.where(at == id_, some, 0.0).sum(-1, keepdims=True)
            return jnp.where(ids == id_, value, picked)

        return _each_id(together, ids, at, step, picked)

    # Not `zeros`, which would not vary over a mesh like the ids.
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
    """Add `values` at `ids`, both `[*batch, n]`, to `total`, `[*batch, block]`."""

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
    # Kernels have no dynamic slices.
    return (
        x if x.shape[-1] == at.shape[-1] else lax.dynamic_slice_in_dim(x, start, at.shape[-1], -1)
    )


def _over_tiles(step: Callable[..., Any], carry: Any, columns: jax.Array) -> Any:
    """Run `step(carry, start, columns)` over tiles of the columns in turn."""
    size = columns.shape[-1]
    count = -(-size // _COLUMNS)
    if count == 1:
        return step(carry, 0, columns)
    width = -(-size // (count * _LANES)) * _LANES

    def tile(index: Any, carry: Any) -> Any:
        # The last tile is moved back and masks the columns that it repeats.
        start = jnp.minimum(index * width, size - width)
        at = lax.dynamic_slice_in_dim(columns, start, width, -1)
        return step(carry, start, jnp.where(start + jnp.arange(width) < index * width, NOWHERE, at))

    return lax.fori_loop(0, count, tile, carry)


def _each_id(
    together: int, ids: jax.Array, at: jax.Array, step: Callable[..., Any], carry: Any
) -> Any:
    """Run `step(carry, id)` with ids in order, `[*batch, 1]`; rows without more get the end."""
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
