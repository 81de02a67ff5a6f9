import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from logitjax import ops
from logitjax.losses._tail_sample import TailSample
from logitjax.ops import Array

# Minimum ratio of variance to mean square for which float32 sums about zero are accurate.
_STEADY = 1e-2
# Float32's largest number divided by this has a square far from either end of float32.
_LARGE = 2.0**80


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphStatistics:
    """Top-k logits of every position, with log-normaliser and moments of all logits.

    A training run computes these once for each teacher without keeping its logits; a blocked loss
    computes the student's in its sweep over the vocabulary.

    Attributes:
        values: the k largest raw logits, descending, `[*batch, positions, k]`.
        indices: their vocabulary ids, int32, `[*batch, positions, k]`.
        log_z: log-sum-exp of the logits, `[*batch, positions]`; None if only top logits were kept,
            and then so are the next two.
        mean: mean of the finite logits, `[*batch, positions]`.
        std: their population standard deviation, `[*batch, positions]`.
        tail: samples from outside the top k, if a cache keeps some.
        vocab_size: size of the vocabulary, static; None if unknown.
    """

    values: Any
    indices: Any
    log_z: Any = None
    mean: Any = None
    std: Any = None
    tail: TailSample | None = None
    vocab_size: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def top_k(self) -> ops.TopK:
        """Values, ids and log-sum-exp, as other losses take them."""
        log_z = None if self.log_z is None else jnp.asarray(self.log_z)
        return ops.TopK(jnp.asarray(self.values), jnp.asarray(self.indices), log_z)

    def truncate(self, k: int) -> "GraphStatistics":
        """Keep the first k of each position; ValueError if there are fewer."""
        stored = self.values.shape[-1]
        if k > stored:
            raise ValueError(f"k: expected at most the {stored} stored logits, got {k}")
        return dataclasses.replace(self, values=self.values[..., :k], indices=self.indices[..., :k])


def graph_statistics(
    logits: Float[Array, "*batch positions vocab"],
    k: int,
    *,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: str | None = None,
) -> GraphStatistics:
    """Top-k logits, log-sum-exp, mean and standard deviation of every position.

    Entries of -inf (a padded vocabulary) and those excluded by `vocab_where` do not count. All
    fields are differentiable. Under `jit`, unused fields cost nothing.

    Args:
        logits: `[*batch, positions, vocab]`, any float type.
        vocab_where: vocabulary entries that count, broadcastable to the logits.
        axis_name: mesh axis that shards the vocabulary, inside `shard_map`.

    Returns:
        `GraphStatistics`, float32, complete on every vocabulary shard.

    Raises:
        ValueError: if k is not in `[1, vocab]`.

    >>> import jax, jax.numpy as jnp
    >>> statistics = jax.jit(graph_statistics, static_argnums=1)
    >>> s = statistics(jnp.array([[1.0, 3.0, 2.0, -jnp.inf]]), 2)
    >>> s.values, s.indices, s.mean
    (Array([[3., 2.]], dtype=float32), Array([[1, 2]], dtype=int32), Array([2.], dtype=float32))
    """
    ops.checks.shapes(logits=(logits, "float *batch vocab"))
    logits = jnp.asarray(logits)
    vocab = logits.shape[-1]
    if axis_name is not None:
        vocab *= jax.lax.axis_size(axis_name)
    if not 1 <= k <= vocab:
        raise ValueError(f"k: expected 1 to the vocabulary size {vocab}, got {k}")
    if vocab_where is not None:
        ops.checks.where(vocab_where, logits.shape, "vocab_where")
        logits = jnp.where(vocab_where, logits, -jnp.inf)
    values, indices = ops.top_k(logits, k, axis_name=axis_name)
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    mean, std = _moments(logits.astype(wide), axis_name)
    return GraphStatistics(
        values=values.astype(wide),
        indices=indices.astype(jnp.int32),
        log_z=ops.logsumexp(logits, axis_name=axis_name),
        mean=mean,
        std=std,
        vocab_size=vocab,
    )


def _moments(logits, axis_name):
    """Mean and deviation of entries other than -inf, in one pass over the logits."""
    # Sums about the first entry avoid cancellation in float32.
    first = jax.lax.stop_gradient(logits[..., :1])
    first = jnp.where(jnp.isfinite(first), first, 0.0)
    if axis_name is not None:
        first = jax.lax.pmean(first, axis_name)
    count, total, squares, unit = _finite_sums(logits, first)
    unit = jax.lax.stop_gradient(unit)
    if axis_name is not None:
        widest = jax.lax.pmax(unit, axis_name)
        share, unit = unit / widest, widest
        sums = jnp.stack([count, total * share, squares * jnp.square(share)])
        count, total, squares = jax.lax.psum(sums, axis_name)
    count = jnp.maximum(count, 1.0)
    offset = total / count
    variance = squares / count - jnp.square(offset)
    # Not `variance > 0`: nan must remain nan.
    flat = variance <= 0
    std = unit * jnp.where(flat, 0.0, jnp.sqrt(jnp.where(flat, 1.0, variance)))
    # Halves, because the distance to the first logit may be twice float32's largest number.
    return 2.0 * (0.5 * first[..., 0] + offset * (0.5 * unit)), std


@jax.custom_jvp
def _finite_sums(x, origin):
    """Count, sum and sum of squares of `(x - origin) / unit` over all but -inf, and the unit."""
    # A mask or an offset inside the reductions makes them several times slower on CPU, so they are
    # applied only if plain sums are not finite or would cancel, and a unit other than 1 only if
    # squares overflow.
    total, squares = x.sum(-1), jnp.square(x).sum(-1)
    n, at = x.shape[-1], origin[..., 0]
    # Also false for nan.
    fine = squares / n - jnp.square(total / n) > _STEADY * (squares / n + jnp.square(at))

    def shifted():
        present = x != -jnp.inf

        def sums(unit):
            kept = jnp.where(present, _over(x, origin, unit), 0.0)
            return present.sum(-1, dtype=x.dtype), kept.sum(-1), jnp.square(kept).sum(-1), unit

        once = sums(jnp.ones_like(total))
        finite = jnp.isfinite(once[2])
        return jax.lax.cond(
            finite.all(), lambda: once, lambda: sums(jnp.where(finite, 1.0, _LARGE).astype(x.dtype))
        )

    def plain():
        count = jnp.full_like(total, n)
        moved = squares - 2 * at * total + n * jnp.square(at)
        return count, total - n * at, moved, jnp.ones_like(total)

    return jax.lax.cond(fine.all(), plain, shifted)


def _over(x, origin, unit):
    scale = 1.0 / unit[..., None]
    return x * scale - origin * scale


@_finite_sums.defjvp
def _finite_sums_jvp(primals, tangents):
    (x, origin), (dx, _) = primals, tangents
    finite = x != -jnp.inf
    count, total, squares, unit = _finite_sums(x, origin)
    dx = dx / unit[..., None]
    # Mask before the product, which is nan for an entry of -inf and a tangent of zero.
    return (count, total, squares, unit), (
        jnp.zeros_like(count),
        jnp.where(finite, dx, 0.0).sum(-1),
        (jnp.where(finite, 2.0 * _over(x, origin, unit), 0.0) * dx).sum(-1),
        jnp.zeros_like(unit),
    )
