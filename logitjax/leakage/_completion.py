"""Completing a matrix of which an API shows k values a row, and whether that can mean anything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Key

from logitjax.ops import Array, checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A completed matrix and what it is worth.

    Attributes:
      rows: ``[n, vocab]``, float32.
      basis: ``[vocab, rank]``.
      misfit: root mean square error where values were given.
      held_out: the same on values that were kept from the fit; relative to their spread.
      identifiable: whether the held-out values were predicted.
      verdict: the same in words.
    """

    rows: np.ndarray
    basis: np.ndarray
    misfit: float
    held_out: float
    identifiable: bool
    verdict: str


def complete_rows(
    values: Float[Array, "n vocab"],
    vocab_where: Bool[Array, "n vocab"],
    rank: int,
    *,
    key: Key[jax.Array, ""],
    iterations: int = 100,
    ridge: float = 1e-4,
    held_out: float = 0.1,
    limit: float = 0.1,
) -> Completion:
    """Complete a low-rank matrix by alternating least squares, judged on held-out entries.

    With k <= rank values a row, *every* basis in general position fits exactly: each row has k
    equations and ``rank`` unknowns. The values then say nothing about the head, and so does the
    verdict, whatever the misfit. By counting, ``n k >= rank (vocab + n - rank)`` are needed; values
    chosen by size, as an API's top-k, need several times that.

    Args:
      values: ``[n, vocab]``; anything where ``vocab_where`` is False.
      vocab_where: ``[n, vocab]``, True where a value is given.
      rank: rank of the matrix, usually the hidden dimension.
      key: key of the start and of the choice of held-out values.
      iterations: number of pairs of half steps.
      ridge: term added to the normal equations, relative to their mean diagonal.
      held_out: share of the given values that the fit does not use.
      limit: held-out error, relative to the values' spread, up to which rows count as found.

    Returns:
      `Completion`.

    Raises:
      TypeError: values are not floating point, or ``vocab_where`` not boolean.
      ValueError: nothing is given in some row, a value that is given is not finite, shapes differ,
        or ``rank`` is not positive.

    >>> rng = np.random.default_rng(0)
    >>> rows = rng.standard_normal((60, 2)) @ rng.standard_normal((2, 40))
    >>> seen = rng.random(rows.shape) < 0.5
    >>> complete_rows(rows, seen, 2, key=jax.random.key(0)).identifiable
    True
    """
    checks.positive(rank, "rank")
    checks.shapes(values=(values, "float n vocab"), vocab_where=(vocab_where, "bool n vocab"))
    vocab_where = np.asarray(vocab_where)
    values = np.where(vocab_where, np.asarray(values, np.float32), np.float32(0.0))
    checks.values(values, np.isfinite, "values", "finite numbers")
    count, vocab = values.shape
    given = vocab_where.sum(axis=1)
    if not given.all():
        raise ValueError(
            f"vocab_where: expected a value in every row, got none in row {int(np.argmin(given))}"
        )
    spread = float(values[vocab_where].std())
    keep_key, start_key = jax.random.split(key)
    kept_back = vocab_where & (
        np.asarray(jax.random.uniform(keep_key, vocab_where.shape)) < held_out
    )
    kept_back &= (vocab_where & ~kept_back).any(axis=1, keepdims=True)
    seen = vocab_where & ~kept_back
    left, right = _alternate(
        jnp.asarray(values), jnp.asarray(seen, jnp.float32), start_key, rank, iterations, ridge
    )
    rows = np.asarray(left @ right.T)
    errors = rows - values
    misfit = float(np.sqrt(np.mean(errors[seen] ** 2)))
    away = float(np.sqrt(np.mean(errors[kept_back] ** 2))) if kept_back.any() else float("nan")
    relative = away / max(spread, 1e-12)
    per_row = float(given.mean())
    need = rank * (vocab + count - rank)
    if per_row <= rank:
        verdict = (
            f"{per_row:.1f} values a row are no more than the rank, {rank}: every head fits them, "
            "so they say nothing about this one"
        )
    elif given.sum() < need:
        verdict = (
            f"{int(given.sum())} values are fewer than the {need} unknowns of rank {rank}: "
            "the matrix is not determined"
        )
    elif not relative <= limit:
        verdict = (
            f"held-out values are off by {relative:.2f} of their spread: counting would allow it, "
            "but this choice of positions did not do"
        )
    else:
        verdict = f"held-out values are predicted to {relative:.2g} of their spread"
    return Completion(
        rows=rows,
        basis=np.asarray(right),
        misfit=misfit,
        held_out=relative,
        identifiable=bool(per_row > rank and given.sum() >= need and relative <= limit),
        verdict=verdict,
    )


def _alternate(
    values: jax.Array,
    seen: jax.Array,
    key: jax.Array,
    rank: int,
    iterations: int,
    ridge: float,
) -> tuple[jax.Array, jax.Array]:
    @jax.jit
    def run(values: jax.Array, seen: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
        def half(values: jax.Array, seen: jax.Array, other: jax.Array) -> jax.Array:
            normal = jnp.einsum("nv,vr,vs->nrs", seen, other, other, optimize=True)
            scale = jnp.trace(normal, axis1=1, axis2=2)[:, None, None] / rank
            normal = normal + (ridge * scale + 1e-9) * jnp.eye(rank)
            target = (seen * values) @ other
            return jnp.linalg.solve(normal, target[..., None])[..., 0]

        def body(_: jax.Array, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            left = half(values, seen, both[1])
            return left, half(values.T, seen.T, left)

        left = jnp.zeros((values.shape[0], rank))
        return jax.lax.fori_loop(0, iterations, body, (left, right))

    start = jax.random.normal(key, (values.shape[1], rank))
    return run(values, seen, start)
