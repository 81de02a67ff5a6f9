"""Subspaces of more rows than fit: a sketch that sees each row once, and randomised SVD."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Key

from logitjax.leakage._gram import cholesky_qr, row_means
from logitjax.ops import Array, AxisName, checks, psum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSketch:
    """``X = Q^T Psi`` with Gaussian Psi, drawn as the rows come.

    Attributes:
        columns: ``[vocab, k]``.
        rows: how many rows it has seen.
        key: key of the next draw.
    """

    columns: jax.Array
    rows: jax.Array
    key: jax.Array


def init_sketch(vocab: int, size: int, key: Key[jax.Array, ""]) -> RowSketch:
    """An empty sketch of ``size`` columns, in vocab x size numbers."""
    checks.positive(size, "size")
    return RowSketch(
        columns=jnp.zeros((vocab, size), jnp.float32), rows=jnp.zeros((), jnp.int32), key=key
    )


@functools.partial(jax.jit, static_argnames=("centre", "axis_name"))
def update_sketch(
    sketch: RowSketch,
    rows: Float[Array, "n vocab"],
    *,
    centre: bool = False,
    axis_name: AxisName | None = None,
) -> RowSketch:
    """Adds rows; they need not be kept. Every process of a sharded vocabulary draws the same Psi.

    Returns:
        The new sketch.
    """
    rows = jnp.asarray(rows, jnp.float32)
    key, draw = jax.random.split(sketch.key)
    psi = jax.random.normal(draw, (rows.shape[0], sketch.columns.shape[1]), jnp.float32)
    added = jnp.matmul(rows.T, psi, precision="highest")
    if centre:
        # Of the product, not of the rows: nothing as large as they are is made.
        mean = row_means(rows, axis_name).astype(jnp.float32)
        added = added - (mean @ psi)[None, :]
    return RowSketch(columns=sketch.columns + added, rows=sketch.rows + rows.shape[0], key=key)


def sketch_basis(
    sketch: RowSketch, *, axis_name: AxisName | None = None
) -> Float[jax.Array, "vocab k"]:
    """An orthonormal basis of what the rows span: exact once the sketch is as wide as their rank.

    With noise on the rows it is not: directions mix with noise in one pass. Take
    `randomised_svd` with a power iteration, or a Gram matrix.

    References:
        Halko, Martinsson and Tropp, 2011, section 5.5 (single pass).
    """
    return cholesky_qr(sketch.columns, axis_name=axis_name)


_STATIC = ("rank", "oversample", "power_iterations", "centre", "axis_name")


@functools.partial(jax.jit, static_argnames=_STATIC)
def randomised_svd(
    rows: Float[Array, "n vocab"],
    rank: int,
    key: Key[jax.Array, ""],
    *,
    oversample: int = 10,
    power_iterations: int = 1,
    centre: bool = False,
    axis_name: AxisName | None = None,
) -> tuple[Float[jax.Array, " k"], Float[jax.Array, "vocab k"]]:
    """The largest singular values and right singular vectors of rows that are in memory.

    Args:
        rank: how many.
        key: key of the test matrix.
        oversample: further columns of the test matrix, which are dropped at the end.
        power_iterations: with noise 1 suffices for the accuracy of a full SVD, 0 does not.
        centre: subtract each row's mean first.
        axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis.

    Returns:
        ``[rank]`` singular values, falling, and ``[vocab, rank]``, float32.

    References:
        Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1, with CholeskyQR2 for QR.
    """
    rows = jnp.asarray(rows, jnp.float32)
    count, vocab = rows.shape
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    if not 1 <= rank <= min(count, vocab * shards):
        raise ValueError(
            f"rank: expected a number between 1 and {min(count, vocab * shards)}, got {rank}"
        )
    size = min(rank + oversample, count)
    mean = (
        row_means(rows, axis_name).astype(jnp.float32) if centre else jnp.zeros(count, jnp.float32)
    )

    def down(left: jax.Array) -> jax.Array:
        product = jnp.matmul(rows.T, left, precision="highest")
        return product - (mean @ left)[None, :]

    def up(right: jax.Array) -> jax.Array:
        product = psum(jnp.matmul(rows, right, precision="highest"), axis_name)
        return product - mean[:, None] * psum(right.sum(axis=0), axis_name)[None, :]

    test = jax.random.normal(key, (count, size), jnp.float32)
    basis = cholesky_qr(down(test), axis_name=axis_name)
    for _ in range(power_iterations):
        left, _ = jnp.linalg.qr(up(basis))
        basis = cholesky_qr(down(left), axis_name=axis_name)
    _, values, inner = jnp.linalg.svd(up(basis), full_matrices=False)
    return values[:rank], jnp.matmul(basis, inner[:rank].T, precision="highest")
