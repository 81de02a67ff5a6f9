"""Which norm precedes a head, and how far it settles what a subspace leaves open."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from logitjax.leakage._gram import gram_matrix
from logitjax.leakage._precision import in_float64
from logitjax.leakage._spectrum import spectrum_gaps
from logitjax.ops import Array, checks


@in_float64
def norm_kind(
    rows: Float[Array, "n vocab"], dimension: int, *, centre: bool = True, least_gap: float = 0.5
) -> str:
    """``layer_norm`` or ``rms_norm``: whether hidden states lie on a hyperplane.

    LayerNorm removes the mean of hidden states before gain and bias, so they fill h - 1 dimensions
    and an affine offset. Subtracting the mean over prompts then lowers the rank of the rows by one.
    After RMSNorm it does not.

    Args:
      rows: ``[n, vocab]``, n > dimension + 1.
      dimension: rank of the rows.
      centre: rows are log-probabilities.
      least_gap: nats by which the last direction must fall to count as gone.

    Returns:
      ``layer_norm`` or ``rms_norm``.

    Raises:
      TypeError: rows are not floating point.
      ValueError: too few rows, values that are not finite, or a dimension below two, of which the
        mean leaves nothing, or beyond the vocabulary.

    References:
      Carlini et al., 2024, appendix B.2.2.

    >>> rng = np.random.default_rng(0)
    >>> states = rng.standard_normal((40, 6))
    >>> head = rng.standard_normal((6, 90))
    >>> norm_kind((states @ head).astype(np.float32), 6, centre=False)
    'rms_norm'
    >>> flat = states - states.mean(axis=1, keepdims=True) + rng.standard_normal(6)
    >>> norm_kind((flat @ head).astype(np.float32), 6, centre=False)
    'layer_norm'
    """
    checks.shapes(rows=(rows, "float n vocab"))
    checks.between(dimension, 2, rows.shape[1], "dimension")
    rows = jnp.asarray(rows)
    if len(rows) <= dimension + 1:
        raise ValueError(f"rows: expected more than {dimension + 1}, got {len(rows)}")
    gram = jax.jit(gram_matrix, static_argnames="centre")(rows, centre=centre)
    gram = np.asarray(gram, np.float64)
    if not np.isfinite(gram).all():
        # Whatever is not finite reaches the Gram matrix, so finite rows never pay for the search.
        checks.values(np.asarray(rows), np.isfinite, "rows", "finite numbers")
    flat = gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean()
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(flat)[::-1], 0.0))
    values = np.maximum(values, values[0] * np.finfo(np.float32).eps)
    gaps = spectrum_gaps(values)
    before, after = gaps[dimension - 2], gaps[dimension - 1]
    return "layer_norm" if before > max(after, least_gap) else "rms_norm"


def settle_by_norm(
    coefficients: Float[Array, "n dimension"],
) -> Float[np.ndarray, "dimension dimension"]:
    """The transform that RMSNorm leaves up to a rotation, from the coefficients of many rows.

    Hidden states behind RMSNorm (without its gain) have length sqrt(h), so coefficients c_i satisfy
    ``c_i^T A c_i = 1`` for one symmetric A. Least squares for A needs h (h + 1) / 2 rows; then
    ``A = L L^T`` and ``c_i L`` are the states up to a rotation.

    Args:
      coefficients: ``[n, dimension]``, of rows in a recovered basis.

    Returns:
      ``[dimension, dimension]``, L: multiply coefficients by it from the right, and the basis by
      the transpose of its inverse.

    Raises:
      TypeError: coefficients are not floating point.
      ValueError: too few rows, values that are not finite, or a solution that is not positive
        definite (noise, or no RMSNorm).

    References:
      Carlini et al., 2024, appendix C.2.

    >>> rng = np.random.default_rng(0)
    >>> states = rng.standard_normal((20, 2))
    >>> states /= np.linalg.norm(states, axis=1, keepdims=True)
    >>> hidden = np.array([[2.0, 0.0], [1.0, 1.0]])
    >>> found = settle_by_norm(states @ hidden)
    >>> turn = hidden @ found
    >>> print(bool(np.allclose(turn @ turn.T, np.eye(2))))
    True
    """
    checks.shapes(coefficients=(coefficients, "float n dimension"))
    c = np.asarray(coefficients, np.float64)
    checks.values(c, np.isfinite, "coefficients", "finite numbers")
    count, width = c.shape
    unknowns = width * (width + 1) // 2
    if count < unknowns:
        raise ValueError(
            f"coefficients: expected at least {unknowns} rows for {width} dimensions, got {count}"
        )
    i, j = np.triu_indices(width)
    system = c[:, i] * c[:, j] * np.where(i == j, 1.0, 2.0)
    solution = np.linalg.lstsq(system, np.ones(count), rcond=None)[0]
    a = np.zeros((width, width))
    a[i, j] = solution
    a[j, i] = solution
    try:
        return np.linalg.cholesky(a)
    except np.linalg.LinAlgError:
        raise ValueError(
            "coefficients: expected those of states behind RMSNorm, got a quadratic form that is "
            "not positive definite: too much noise, or another norm"
        ) from None
