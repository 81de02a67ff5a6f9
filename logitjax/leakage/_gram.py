"""Gram matrices of wide rows, by blocks."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from logitjax.leakage._precision import widest
from logitjax.ops import Array, checks


# One program where it is called on its own.
@functools.partial(jax.jit, static_argnames=("centre", "block_size"))
def gram_matrix(
    rows: Float[Array, "n vocab"],
    *,
    centre: bool = False,
    block_size: int = 8192,
) -> Float[jax.Array, "n n"]:
    """``Q Q^T``, added up over blocks of the vocabulary.

    In float64 where 64-bit types are on: the Gram matrix squares the singular values, so float32
    loses every direction below 3e-4 of the first.

    Args:
        centre: subtract each row's mean first, which removes the normaliser of log-probabilities.
        block_size: columns at a time; memory is n x block_size.
    """
    checks.positive(block_size, "block_size")
    rows = jnp.asarray(rows)
    count, vocab = rows.shape
    dtype = widest()
    mean = row_means(rows)[:, None] if centre else jnp.zeros((count, 1), dtype)

    def product(block: jax.Array) -> jax.Array:
        block = block.astype(dtype) - mean
        return _symmetric_product(block)

    size = min(block_size, vocab)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + product(lax.dynamic_slice_in_dim(rows, i * size, size, axis=1))

    total = jnp.zeros((count, count), dtype)
    total = lax.fori_loop(0, vocab // size, body, total)
    if vocab % size:
        total = total + product(rows[:, vocab - vocab % size :])
    return total


def row_means(rows: Array) -> jax.Array:
    """``[n]``: means over the vocabulary."""
    return jnp.sum(jnp.asarray(rows), axis=-1, dtype=widest()) / rows.shape[-1]


def _symmetric_product(block: jax.Array) -> jax.Array:
    """``block block^T``, the lower half mirrored: XLA has no product that knows the symmetry."""
    count = block.shape[0]
    if count < 512:
        return jnp.matmul(block, block.T, precision="highest")
    parts = 4
    edges = [count * i // parts for i in range(parts + 1)]
    strips = []
    for i in range(parts):
        here = block[edges[i] : edges[i + 1]]
        strip = jnp.matmul(here, block[: edges[i + 1]].T, precision="highest")
        strips.append(jnp.pad(strip, ((0, 0), (0, count - edges[i + 1]))))
    lower = jnp.tril(jnp.concatenate(strips))
    return lower + jnp.tril(lower, -1).T
