"""How many directions a spectrum shows: the rule of the papers, and rules for real spectra."""

import math

import jax
import numpy as np
from jaxtyping import Float, Key

from logitjax.ops import Array, checks


def clip_spectrum(singular_values: Float[Array, " n"]) -> Float[np.ndarray, " n"]:
    """Falling singular values, none below what rounding leaves of the first.

    Exact zeros would make infinite gaps among the noise.

    >>> clip_spectrum(np.array([0.0, 2.0]))[1] > 0
    np.True_
    """
    given = np.asarray(singular_values)
    eps = float(np.finfo(given.dtype if given.dtype.kind == "f" else np.float64).eps)
    values = np.sort(given.astype(np.float64))[::-1]
    return np.maximum(values, values[0] * eps * len(values))


def spectrum_gaps(singular_values: Float[Array, " n"]) -> Float[np.ndarray, " n-1"]:
    """``log s_i - log s_(i+1)``, in nats."""
    return -np.diff(np.log(clip_spectrum(singular_values)))


def max_gap_dimension(singular_values: Float[Array, " n"], *, smallest: int = 1) -> int:
    """The number of singular values before the largest gap.

    ::

        argmax_i (log s_i - log s_(i+1)),  smallest <= i

    As published it looks everywhere (``smallest=1``); a real, anisotropic spectrum under noise of
    0.2 nats then answers 1. Restricting it to, say, a twentieth of the rows mends that for a while.

    Args:
      singular_values: ``[n]``.
      smallest: gaps before so many are not looked at.

    Returns:
      The dimension.

    Raises:
      ValueError: ``smallest`` leaves no gap.

    References:
      Carlini et al., 2024, section 4.2.

    >>> max_gap_dimension(np.array([9.0, 5.0, 1e-3, 1e-4]))
    2
    """
    gaps = spectrum_gaps(singular_values)
    if not 1 <= smallest <= len(gaps):
        raise ValueError(f"smallest must be between 1 and {len(gaps)}, got {smallest}")
    return int(np.argmax(gaps[smallest - 1 :])) + smallest


def noise_edge(sigma: float, rows: int, columns: int) -> float:
    """The largest singular value of noise alone: ``sigma (sqrt(n) + sqrt(V))``.

    >>> noise_edge(0.5, 4, 9)
    2.5
    """
    return sigma * (math.sqrt(rows) + math.sqrt(columns))


def rounding_noise(decimals: int) -> float:
    """Noise that rounding amounts to: ``10^-decimals / sqrt(12)``.

    >>> round(rounding_noise(2), 5)
    0.00289
    """
    return 10.0**-decimals / math.sqrt(12)


def null_gap(
    rows: int, columns: int, key: Key[jax.Array, ""], *, smallest: int = 1, draws: int = 3
) -> float:
    """The largest gap of pure noise of this size, in nats: what a gap has to exceed to mean much.

    >>> null_gap(8, 64, jax.random.key(0)) < 1
    True
    """
    checks.positive(draws, "draws")
    # The spectrum of a wide noise matrix is that of its Gram matrix; more columns change little.
    columns = min(columns, 16 * rows)
    gaps = []
    for one in jax.random.split(key, draws):
        noise = np.asarray(jax.random.normal(one, (rows, columns)), np.float64)
        values = np.sqrt(np.maximum(np.linalg.eigvalsh(noise @ noise.T), 0.0))
        gaps.append(spectrum_gaps(values)[smallest - 1 :].max())
    return float(max(gaps))
