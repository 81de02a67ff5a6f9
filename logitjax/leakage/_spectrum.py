"""Singular values of rows, and those that noise alone would have."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from logitjax.ops import Array

#: Number of values that must remain for a fit of the noise.
_FEWEST = 8
# Quantile of the Tracy-Widom distribution (real matrices) exceeded by one spectrum in a hundred.
_TRACY_WIDOM_99 = 2.02


def clip_spectrum(singular_values: Float[Array, " n"]) -> Float[np.ndarray, " n"]:
    """Decreasing singular values, none below the rounding error of the first."""
    spectrum = np.asarray(singular_values)
    eps = float(np.finfo(spectrum.dtype if spectrum.dtype.kind == "f" else np.float64).eps)
    values = np.sort(spectrum.astype(np.float64))[::-1]
    return np.maximum(values, max(values[0] * eps * len(values), np.finfo(np.float64).tiny))


def spectrum_gaps(singular_values: Float[Array, " n"]) -> Float[np.ndarray, " n-1"]:
    """``log s_i - log s_(i+1)``, in nats."""
    return -np.diff(np.log(clip_spectrum(singular_values)))


def max_gap_dimension(singular_values: Float[Array, " n"]) -> int:
    """The number of singular values before the largest gap (Carlini et al., 2024, section 4.2).

    It always returns a number: 1 on a real spectrum under noise, nearly n on noise alone.
    """
    return int(np.argmax(spectrum_gaps(singular_values))) + 1


def noise_edge(sigma: Any, rows: Any, columns: Any) -> Any:
    """The largest singular value of white noise, exceeded by one matrix in a hundred; elementwise.

    By Johnstone, 2001 (Annals of Statistics 29), theorem 1.1::

        sigma sqrt((a + b)^2 + q (a + b) (1 / a + 1 / b)^(1/3)),   a = sqrt(n - 1), b = sqrt(V)
    """
    a, b = np.sqrt(np.maximum(np.asarray(rows) - 1.0, 1.0)), np.sqrt(columns)
    spread = _TRACY_WIDOM_99 * (a + b) * np.cbrt(1 / a + 1 / b)
    return sigma * np.sqrt((a + b) ** 2 + spread)


def rounding_noise(decimals: int) -> float:
    """Noise equivalent to rounding: ``10^-decimals / sqrt(12)``."""
    # The standard deviation of a uniform error of one unit in the last decimal.
    return 10.0**-decimals / math.sqrt(12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhiteNoise:
    """Noise of size `sigma` that explains a spectrum except for the values `above` its `edge`."""

    above: int
    sigma: float
    edge: float

    def floor(self, rows: int, columns: int, observed: float) -> float:
        """Singular value without noise of a direction observed with noise at `observed`.

        `observed^2 = (s^2 + n sigma^2) (s^2 + V sigma^2) / s^2`, by Benaych-Georges and Nadakuditi,
        2012, section 3.1.
        """
        both = observed**2 - self.sigma**2 * (rows + columns)
        inner = both**2 - 4 * self.sigma**4 * rows * columns
        return math.sqrt(max(0.0, both + math.sqrt(max(0.0, inner))) / 2)


def fit_white_noise(values: Float[np.ndarray, " n"], rows: int, columns: int) -> WhiteNoise | None:
    """The fewest directions beyond which a spectrum is that of white noise, at both of its ends.

    For k = 0, 1, ...: sigma from the values after the k-th, which must then be below `noise_edge`
    (Kritchman and Nadler, 2008); the last must be above the lower edge, our addition, which
    separates noise from a falling signal. None if no k with eight values left satisfies this.
    """
    if len(values) <= _FEWEST:
        return None
    k = np.arange(len(values) - _FEWEST + 1)
    squares = values.astype(np.float64) ** 2
    # The rest beyond the first k directions is spread over (rows - k) (columns - k) numbers.
    left = np.cumsum(squares[::-1])[::-1][k]
    r, c = rows - k, columns - k
    sigma = np.sqrt(left / (r * c))
    edge = noise_edge(sigma, r, c)
    distance = np.abs(np.sqrt(c) - np.sqrt(r))
    # Fluctuation of the smallest singular value; one in a thousand exceeds 3.5 units of it.
    slack = 3.5 * distance * np.cbrt(np.abs(1 / np.sqrt(r) - 1 / np.sqrt(c)))
    fits = (values[k] <= edge) & (squares[-1] >= sigma**2 * (distance**2 - slack))
    if not fits.any():
        return None
    first = int(np.argmax(fits))
    return WhiteNoise(above=first, sigma=float(sigma[first]), edge=float(edge[first]))
