"""The k-th largest entry, by counting."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from logitjax.ops import Array, AxisName, checks, psum


def kth_largest(
    values: Float[Array, "*batch vocab"], k: int, *, axis_name: AxisName | None = None
) -> Float[jax.Array, "*batch"]:
    """The k-th largest entry along the last axis: `top_k(values, k)[0][..., -1]`.

    For a threshold, where k is large and the entries above it are not asked for: nothing is sorted.
    The answer is put together bit by bit, from the sign down, each bit by counting the entries that
    are at least as large; so the time does not depend on k, and shards exchange counts only.

    Args:
        values: `[*batch, vocab]`. `-inf` entries come last; which of 0.0 and -0.0 is returned is
            left open.
        k: how many entries are at least as large as the answer, at most the vocabulary.
        axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis: that axis.

    Returns:
        `[*batch]`, an entry of `values` in its dtype. It has no gradient.
    """
    values = lax.stop_gradient(jnp.asarray(values))
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    vocab = values.shape[-1] if values.ndim else 0
    if not 1 <= k <= vocab * shards:
        raise ValueError(f"k: expected 1 to the size of the vocabulary, {vocab * shards}, got {k}")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"values: expected floating-point numbers, got {values.dtype}")
    if axis_name is None:
        checks.vocabulary_unsharded(values, "values", "k-th largest entry")
    bits = jnp.finfo(values.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    sign = jnp.asarray(1 << (bits - 1), unsigned)
    pattern = lax.bitcast_convert_type(values, unsigned)
    # As unsigned integers these are in the order of the numbers.
    ordered = jnp.where(pattern < sign, pattern | sign, ~pattern)

    def with_bit(n: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (sign >> n.astype(unsigned))
        count = psum((ordered >= tried[..., None]).sum(-1, dtype=jnp.int32), axis_name)
        return jnp.where(count >= k, tried, found)

    # The answer is the same on all shards: it varies over no axis that the values are split over.
    none = psum(ordered[..., 0] & 0, axis_name)
    found = lax.fori_loop(0, bits, with_bit, none)
    pattern = jnp.where(found < sign, ~found, found ^ sign)
    return lax.bitcast_convert_type(pattern, values.dtype)
