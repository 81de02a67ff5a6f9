"""Gram matrices of wide rows, by blocks, and orthonormal columns through them."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from logitjax.leakage._precision import widest
from logitjax.ops import Array, AxisName, checks, psum


# One program where it is called on its own, as those below.
@functools.partial(jax.jit, static_argnames=("centre", "block_size", "axis_name"))
def gram_matrix(
    rows: Float[Array, "n vocab"],
    *,
    centre: bool = False,
    block_size: int = 8192,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "n n"]:
    """``Q Q^T``, added up over blocks of the vocabulary.

    In float64 where 64-bit types are on: the Gram matrix squares the singular values, so float32
    loses every direction below 3e-4 of the first.

    Args:
        centre: subtract each row's mean first, which removes the normaliser of log-probabilities.
        block_size: columns at a time; memory is n x block_size.
        axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis.

    Returns:
        ``[n, n]``, float32 or float64.
    """
    checks.positive(block_size, "block_size")
    rows = jnp.asarray(rows)
    count, vocab = rows.shape
    dtype = widest()
    mean = row_means(rows, axis_name)[:, None] if centre else jnp.zeros((count, 1), dtype)

    def product(block: jax.Array) -> jax.Array:
        block = block.astype(dtype) - mean
        return _symmetric_product(block)

    size = min(block_size, vocab)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + product(lax.dynamic_slice_in_dim(rows, i * size, size, axis=1))

    total = jnp.zeros((count, count), dtype)
    if axis_name is not None:
        total = lax.pcast(total, axis_name, to="varying")
    total = lax.fori_loop(0, vocab // size, body, total)
    if vocab % size:
        total = total + product(rows[:, vocab - vocab % size :])
    return psum(total, axis_name)


def row_means(rows: Array, axis_name: AxisName | None = None) -> jax.Array:
    """``[n]``: means over the whole vocabulary, split or not."""
    total = psum(jnp.sum(jnp.asarray(rows), axis=-1, dtype=widest()), axis_name)
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    return total / (rows.shape[-1] * shards)


@functools.partial(jax.jit, static_argnames="axis_name")
def cholesky_qr(
    columns: Float[Array, "vocab k"], *, axis_name: AxisName | None = None
) -> Float[jax.Array, "vocab k"]:
    """An orthonormal basis of the columns, by Cholesky factors of their Gram matrix, twice.

    Matrix products where Householder's QR is sequential, and one k x k sum over shards. The second
    pass repairs what the first loses; columns may be as dependent as 1e-7 of the largest in
    float64.

    Args:
        columns: ``[vocab, k]``, k <= vocab.
        axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis.

    Returns:
        ``[vocab, k]``, the dtype of ``columns``.

    References:
        Yamamoto et al., Roundoff error analysis of the CholeskyQR2 algorithm, 2015.
    """
    columns = jnp.asarray(columns)
    for _ in range(2):
        gram = gram_matrix(columns.T, axis_name=axis_name)
        # A shift far below what counts keeps dependent columns from breaking the factorisation.
        tiny = jnp.finfo(gram.dtype).eps * columns.shape[1]
        gram = gram + tiny * jnp.trace(gram) * jnp.eye(len(gram), dtype=gram.dtype)
        lower = jnp.linalg.cholesky(gram)
        inverse = jax.scipy.linalg.solve_triangular(
            lower, jnp.eye(len(gram), dtype=gram.dtype), lower=True
        )
        columns = columns @ inverse.T.astype(columns.dtype)
    return columns


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
