"""The column space of an output head, and its width, from rows of logits."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float, Int

from logitjax.leakage._gram import Table, project, spectrum
from logitjax.leakage._residual import finite_columns
from logitjax.leakage._spectrum import clip_spectrum, max_gap_dimension, rounding_noise
from logitjax.leakage._width import OutputWidth, judge_width
from logitjax.ops import Array, checks

# Condition of a basis at some tokens, by which errors of their values grow.
_CONDITION = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputSubspace:
    """A head's output subspace, read from rows of logits.

    Attributes:
        basis: ``[vocab, dimension]`` float32, orthonormal: the head is ``basis @ G``, G unknown.
            Zero for tokens excluded by ``vocab_where``.
        width: the hidden dimension as an interval with its reason, or a refusal.
        singular_values: singular values of the rows, falling.
        vocab_where: ``[vocab]``, tokens whose values were finite in all rows.
    """

    basis: np.ndarray
    width: OutputWidth
    singular_values: np.ndarray
    vocab_where: Bool[np.ndarray, " vocab"]

    @property
    def dimension(self) -> int:
        """Number of columns of the basis: as requested, otherwise the estimate or lower bound."""
        return self.basis.shape[1]

    @property
    def max_gap(self) -> int:
        """The published estimate of the width, which returns a number for any rows."""
        return max_gap_dimension(self.singular_values)

    def choose_tokens(self, count: int) -> Int[np.ndarray, " count"]:
        """Tokens at which `complete` is well-conditioned: by pivoted QR, then large rows."""
        basis = self.basis.astype(np.float64)
        vocab, rank = basis.shape
        if not rank <= count <= vocab:
            raise ValueError(f"count: expected a number from {rank} to {vocab}, got {count}")
        order: np.ndarray = scipy.linalg.qr(basis.T, mode="r", pivoting=True)[-1]  # pyright: ignore
        rest = np.setdiff1d(np.arange(vocab), order[:rank])
        size = np.einsum("vr,vr->v", basis[rest], basis[rest])
        return np.concatenate([order[:rank], rest[np.argsort(-size)[: count - rank]]])

    def complete(self, tokens: Int[Array, " m"], values: Float[Array, "n m"]) -> np.ndarray:
        """Complete rows from a few of their values, by least squares in the basis.

        ``values = basis[tokens] c + shift``, then ``row = basis c + shift``, with each row's
        normaliser as shift: h + 1 values determine all V. Errors of the values are multiplied by up
        to the condition of the basis at the tokens; a condition above 1e6 is refused. Values ``[n,
        m]`` at ``[m]`` distinct tokens become ``[n, vocab]``, NaN where ``vocab_where`` is False.
        """
        tokens, values = np.asarray(tokens), np.asarray(values, np.float64)
        if not self.vocab_where[tokens].all():
            raise ValueError("tokens: expected tokens of the basis, got a masked one")
        array = np.concatenate([self.basis, np.ones((len(self.basis), 1))], axis=1)
        unknowns, system = array.shape[1], array[tokens]
        if len(tokens) < unknowns:
            raise ValueError(f"tokens: expected at least {unknowns}, got {len(tokens)}")
        result, _, _, singular = np.linalg.lstsq(system, values.T, rcond=None)
        if singular[0] > _CONDITION * singular[-1]:
            condition = singular[0] / max(singular[-1], 1e-300)
            raise ValueError(
                f"tokens: expected a condition of at most {_CONDITION:.2g}, got {condition:.2g}: "
                "take more, or choose_tokens()"
            )
        return np.where(self.vocab_where, (array @ result).T, np.nan)


def estimate_output_subspace(
    rows: Float[Array, "n vocab"],
    *,
    dimension: int | None = None,
    noise: float | None = None,
    decimals: int | None = None,
    centre: bool = True,
) -> OutputSubspace:
    """Estimate hidden dimension and column space from rows of logits or log-probabilities.

    Rows are W h_i (- c_i 1), so they span at most h dimensions, h + 1 with the normalisers.
    Centring each row removes the normalisers and leaves the head modulo multiples of the ones
    vector. The float64 n x n Gram matrix shows the whole spectrum, to half of float64's digits.

    The width is tested: everything beyond k directions must be rounding, or white noise of a fitted
    size (`OutputWidth`). A token with a NaN or an infinity in some row is left out. Carlini et al.,
    2024, section 4, and Finlayson et al., 2024, section 4, read the width off the largest gap,
    which gives n if n < h, and 1 on a real spectrum under noise.

    Args:
        rows: ``[n, vocab]``, n > h; those on the host are copied whole only to leave tokens out.
        dimension: columns of the basis, if the width is known; the width is still tested.
        noise: standard deviation of the API's noise on a value, 0 for none, None if unknown. It is
            tested against the rows, and sharpens the result of few rows.
        decimals: number of decimals to which the API rounds, a further source of noise.
        centre: see above; False for logits.

    Raises:
        TypeError: rows are not floating point.
        ValueError: rows of another rank, a dimension beyond n rows, or most tokens left out.

    >>> rng = np.random.default_rng(0)
    >>> head, states = rng.standard_normal((50, 3)), rng.standard_normal((12, 3))
    >>> found = estimate_output_subspace((states @ head.T).astype(np.float32), centre=False)
    >>> print(found.width, "|", found.width.reason)
    3 | the rest is rounding
    """
    checks.shapes(rows=(rows, "float n vocab"))
    count, vocab = rows.shape
    if dimension is not None and not 1 <= dimension <= min(count, vocab):
        raise ValueError(
            f"dimension: expected one that {count} rows of {vocab} can show, got {dimension}"
        )
    if noise is not None and not 0 <= noise < math.inf:
        raise ValueError(f"noise: expected a number that is not negative, got {noise}")
    if decimals is not None:
        noise = math.hypot(noise or 0.0, rounding_noise(decimals))
    rows = np.asarray(rows)
    table = Table.of(rows, centre=centre)
    full = spectrum(table)
    where = np.ones(vocab, bool)
    if not np.isfinite(full.values).all():
        # NaN and infinities reach every singular value, so finite rows never pay for the search.
        where = finite_columns(rows)
        if where.sum() < max(2, vocab / 2):
            raise ValueError(
                f"rows: expected finite values in most tokens, got {vocab - where.sum()} of "
                f"{vocab} with a NaN or an infinity"
            )
        table = Table.of(rows[:, where], centre=centre)
        full = spectrum(table)
    step, columns = _largest_rounding(table.rows), table.rows.shape[1] - centre
    width = judge_width(table, full.gram, step=step, columns=columns, named=noise)
    size = dimension or width.estimate or width.lower
    smallest = np.sqrt(np.finfo(np.float64).eps) * full.values[0]
    scaled = full.left[:, :size] / np.maximum(full.values[:size], smallest)
    basis = np.zeros((vocab, scaled.shape[1]), np.float32)
    basis[where] = project(table.rows, scaled, table.means if centre else None)
    return OutputSubspace(
        basis=basis, width=width, singular_values=clip_spectrum(full.values), vocab_where=where
    )


def _largest_rounding(rows: np.ndarray) -> float:
    """Bound the rounding of a value's last bits by the number format and the products."""
    dtype = jnp.dtype(rows.dtype)
    half = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 16
    # Products in float32 lose some of the last bits; 16-bit values are rounded once.
    eps = float(jnp.finfo(dtype).eps) if half else 16 * float(jnp.finfo(jnp.float32).eps)
    # Rounding applies to the values as received, including their means.
    squares = sum(float((row.astype(np.float64) ** 2).sum()) for row in rows)
    return eps * math.sqrt(squares / rows.size)
