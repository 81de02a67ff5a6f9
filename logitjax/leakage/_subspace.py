"""The column space of an output head, and its width, from rows of logits."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from logitjax.leakage._dimension import (
    clip_spectrum,
    max_gap_dimension,
    noise_edge,
    null_gap,
    rounding_noise,
    spectrum_gaps,
)
from logitjax.leakage._gram import cholesky_qr, gram_matrix, row_means
from logitjax.leakage._host import host_gram, host_project, on_host
from logitjax.leakage._known_basis import BasisFit, choose_tokens, rows_from_basis
from logitjax.leakage._precision import in_float64
from logitjax.leakage._sketch import init_sketch, randomised_svd, sketch_basis, update_sketch
from logitjax.ops import Array

METHODS = ("auto", "gram", "sketch", "randomised")
#: Rows up to which the n x n eigenproblem is the cheapest of all.
GRAM_ROWS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputSubspace:
    """What rows of logits tell of the head that made them.

    Attributes:
      basis: ``[vocab, dimension]`` float32, orthonormal: the head is ``basis @ G``, G unknown.
      singular_values: of the rows, falling; as many as the method finds.
      dimension: the estimate of the hidden dimension that was used.
      max_gap: the published estimate, looking everywhere.
      restricted_gap: the same, beyond a twentieth of the rows.
      above_edge: directions above the noise edge; None where no noise was named.
      noise_edge: the largest singular value of the noise alone; None where none was named.
      gap: nats, at ``dimension``; compare with `null_gap`.
      count: number of rows.
      method: what was computed.
    """

    basis: jax.Array
    singular_values: np.ndarray
    dimension: int
    max_gap: int
    restricted_gap: int
    above_edge: int | None
    noise_edge: float | None
    gap: float
    count: int
    method: str

    def null_gap(self, key: Key[jax.Array, ""], *, draws: int = 3) -> float:
        """The largest gap of pure noise of this size, in nats: what `gap` has to exceed."""
        return null_gap(self.count, len(self.basis), key, draws=draws)

    def choose_tokens(self, count: int) -> Int[np.ndarray, " count"]:
        """Tokens at which to ask, so that `complete` is well-conditioned.

        Args:
          count: how many, at least the dimension; twice the dimension is a good number.

        Raises:
          ValueError: too few or too many.
        """
        return choose_tokens(np.asarray(self.basis), count)

    def complete(
        self, tokens: Int[Array, " m"], values: Float[Array, "n m"], **options: Any
    ) -> BasisFit:
        """Whole rows from a few of their values.

        Args:
          tokens: ``[m]`` where the values were taken, distinct.
          values: ``[n, m]``.
          **options: ``unknown_shift`` and ``largest_condition`` of `rows_from_basis`.

        Returns:
          `BasisFit`, whose ``rows`` are ``[n, vocab]``.

        Raises:
          ValueError: fewer values than unknowns, or ill-conditioned ones: says what to do.
        """
        return rows_from_basis(np.asarray(self.basis), tokens, values, **options)


@in_float64
def estimate_output_subspace(
    rows: Float[Array, "n vocab"],
    *,
    dimension: int | None = None,
    noise: float = 0.0,
    decimals: int | None = None,
    centre: bool = True,
    method: str = "auto",
    max_rank: int | None = None,
    key: Key[jax.Array, ""] | None = None,
    block_size: int = 8192,
) -> OutputSubspace:
    """Estimates hidden dimension and column space from rows of logits or log-probabilities.

    Rows are W h_i (- c_i 1), so they span at most h dimensions, h + 1 with the normalisers;
    centring each row removes those and leaves the head modulo multiples of the ones vector. Three
    ways:

    - ``gram``: float64 n x n Gram matrix by blocks of the vocabulary, then its eigenvectors: exact
      to half of float64's digits, cheapest up to about twice h rows, n^2 + V h numbers.
    - ``sketch``: one pass, ``max_rank`` columns, exact without noise; V x max_rank numbers.
    - ``randomised``: SVD of rank ``max_rank`` with a power iteration, for noise and many rows.

    ``auto`` takes the Gram matrix up to 4,096 rows, else the sketch without noise and the
    randomised SVD with it.

    Args:
      rows: ``[n, vocab]``, n > h. They are never copied whole.
      dimension: where the width is known, or to look at fewer directions.
      noise: standard deviation of what the API adds to a value; decides the estimator: above
        it the noise edge, without it the largest gap beyond a twentieth of the rows.
      decimals: to how many the API rounds a value, which is more noise.
      centre: see above; False for logits.
      method: as above.
      max_rank: an upper bound of h, for ``sketch`` and ``randomised``; by default half the rows.
      key: for these two.
      block_size: tokens at a time for the Gram matrix, on the host by BLAS.

    Returns:
      `OutputSubspace`.

    Raises:
      ValueError: an unknown method, or a dimension that n rows cannot show.

    References:
      Carlini et al., 2024, section 4; Finlayson et al., 2024, section 4. The largest gap looks
      everywhere there, which a real spectrum under noise defeats.

    >>> rng = np.random.default_rng(0)
    >>> head, states = rng.standard_normal((50, 3)), rng.standard_normal((12, 3))
    >>> estimate_output_subspace((states @ head.T).astype(np.float32), centre=False).dimension
    3
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    count, vocab = rows.shape
    if dimension is not None and not 1 <= dimension <= min(count, vocab):
        raise ValueError(f"{count} rows of {vocab} show no dimension {dimension}")
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    if decimals is not None:
        noise = math.hypot(noise, rounding_noise(decimals))
    rank = min(max(dimension or 0, max_rank or (count + 1) // 2), count, vocab)
    key = jax.random.key(0) if key is None else key
    if method == "auto":
        small = count <= GRAM_ROWS
        method = "gram" if small else ("randomised" if noise else "sketch")
    if method == "gram":
        values, basis_of = _by_gram(rows, centre, block_size)
    elif method == "randomised":
        values, basis_of = _randomised(rows, rank, key, centre)
    else:
        values, basis_of = _by_sketch(rows, rank, key, centre)
    smallest = min(max(1, count // 20), len(values) - 1)
    restricted = max_gap_dimension(values, smallest=smallest)
    edge = noise_edge(noise, count, vocab) if noise else None
    above = None if edge is None else int((clip_spectrum(values) > edge).sum())
    found = dimension or (restricted if above is None else max(above, 1))
    gaps = spectrum_gaps(values)
    return OutputSubspace(
        basis=basis_of(found),
        singular_values=clip_spectrum(values),
        dimension=found,
        max_gap=max_gap_dimension(values),
        restricted_gap=restricted,
        above_edge=above,
        noise_edge=edge,
        gap=float(gaps[min(found, len(gaps)) - 1]),
        count=count,
        method=method,
    )


def _by_gram(
    rows: Array, centre: bool, block_size: int
) -> tuple[np.ndarray, Callable[[int], jax.Array]]:
    held = np.asarray(rows) if on_host(rows) else None
    if held is None:
        gram = jax.jit(gram_matrix, static_argnames=("centre", "block_size"))(
            rows, centre=centre, block_size=block_size
        )
    else:
        gram = jnp.asarray(host_gram(held, centre=centre, block_size=block_size))
    squares, left = jnp.linalg.eigh(gram)
    values = np.asarray(jnp.sqrt(jnp.maximum(squares[::-1], 0.0)))
    # float64 squared: what lies under the root of its precision is rounding.
    floor = values[0] * float(jnp.finfo(gram.dtype).eps) ** 0.5
    values = np.maximum(values, floor)

    def basis(size: int) -> jax.Array:
        scaled = left[:, ::-1][:, :size] / values[:size]
        if held is None:
            mean = row_means(rows) if centre else jnp.zeros(rows.shape[0], jnp.float32)
            return _project(rows, scaled, mean)
        mean = held.mean(axis=1, dtype=np.float64) if centre else None
        return host_project(held, np.asarray(scaled), mean, block_size=block_size)

    return values, basis


@jax.jit
def _project(rows: jax.Array, left: jax.Array, mean: jax.Array) -> jax.Array:
    left = left.astype(jnp.float32)
    product = jnp.matmul(rows.T.astype(jnp.float32), left, precision="highest")
    return product - (mean.astype(jnp.float32) @ left)[None, :]


def _randomised(
    rows: Array, rank: int, key: jax.Array, centre: bool
) -> tuple[np.ndarray, Callable[[int], jax.Array]]:
    run = jax.jit(randomised_svd, static_argnums=1, static_argnames="centre")
    values, vectors = run(rows, rank, key, centre=centre)
    return np.asarray(values), lambda size: vectors[:, :size]


def _by_sketch(
    rows: Array, rank: int, key: jax.Array, centre: bool
) -> tuple[np.ndarray, Callable[[int], jax.Array]]:
    sketch = init_sketch(rows.shape[1], rank, key)
    step = jax.jit(update_sketch, static_argnames="centre", donate_argnums=0)
    size = 256
    for start in range(0, rows.shape[0], size):
        sketch = step(sketch, rows[start : start + size], centre=centre)
    # Singular values of the sketch, over sqrt(k): those of the rows up to a factor near one.
    gram = jax.jit(gram_matrix)(sketch.columns.T)
    squares, inner = jnp.linalg.eigh(gram)
    values = np.asarray(jnp.sqrt(jnp.maximum(squares[::-1], 0.0) / rank))
    values = np.maximum(values, values[0] * float(jnp.finfo(jnp.float32).eps))

    def basis(size: int) -> jax.Array:
        if size == rank:
            return sketch_basis(sketch)
        few = sketch.columns @ inner[:, ::-1][:, :size].astype(jnp.float32)
        return cholesky_qr(few)

    return values, basis
