"""Estimates whose intervals cover two variances: that of seeds and that of shared units."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

DRAWS = 10_000
LEVEL = 0.95
POWER = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds and units.

    Attributes:
        low: Lower end of the 95 % interval; `high` is the upper one.
        p: Two-sided p-value of no effect.
        detectable: The smallest mean that this many seeds detect with power .8.
    """

    value: float
    low: float
    high: float
    p: float
    detectable: float


def crossed(values: np.ndarray, *, overlap: float = 0.0) -> Estimate:
    """The mean of `[seeds, units]`, resampling seeds and units together.

    A t interval over seeds misses that other units would have given another result, and a bootstrap
    of few seeds is too narrow. So each end of the interval is the wider of the two, and the larger
    p-value counts. Seeds with overlapping training data vary less than new ones would: `overlap` is
    added to 1 / seeds.
    """
    seeds, value = len(values), float(values.mean())
    low, high, p = _student(values.mean(1), overlap)
    if values.shape[1] > 1:
        means = _bootstrap(values)
        tail = (1 - LEVEL) / 2
        low = min(low, float(np.quantile(means, tail)))
        high = max(high, float(np.quantile(means, 1 - tail)))
        # The share of draws on the other side of zero, never less than one draw.
        beyond = min((means <= 0).mean(), (means >= 0).mean())
        p = max(p, min(1.0, 2 * max(beyond, 1 / DRAWS)))
    return _estimate(value, low, high, p, freedom=max(seeds - 1, 1))


def _estimate(value: float, low: float, high: float, p: float, *, freedom: int) -> Estimate:
    # A 95 % quantile turns the standard error into the half-width; power adds its own.
    quantile = stats.t.ppf(1 - (1 - LEVEL) / 2, freedom)
    detectable = (high - low) / 2 / quantile * (quantile + stats.t.ppf(POWER, freedom))
    return Estimate(value=value, low=low, high=high, p=float(p), detectable=float(detectable))


def spread(first: np.ndarray, second: np.ndarray) -> Estimate:
    """The logarithm of the ratio of two standard deviations of paired seeds (Pitman, Morgan)."""
    freedom = len(first) - 2
    quantile = stats.t.ppf(1 - (1 - LEVEL) / 2, freedom)
    shared = 1 + 2 * (1 - np.corrcoef(first, second)[0, 1] ** 2) * quantile**2 / freedom
    value = float(np.log(second.std() / first.std()))
    half = float(np.log(shared + np.sqrt(shared**2 - 1))) / 2
    # Equal spreads leave sums and differences uncorrelated.
    p: Any = stats.pearsonr(second + first, second - first)[1]
    return _estimate(value, value - half, value + half, p, freedom=freedom)


def _student(means: np.ndarray, overlap: float) -> tuple[float, float, float]:
    """95 % interval and p-value of a mean over seeds; a single seed gives neither."""
    if len(means) < 2:
        return -np.inf, np.inf, 1.0
    error = means.std(ddof=1) * np.sqrt(1 / len(means) + overlap)
    if error <= 1e-12:  # Equal with every seed: no variance to test the mean against.
        return float(means.mean()), float(means.mean()), 0.0 if means.mean() else 1.0
    low, high = stats.t.interval(LEVEL, len(means) - 1, means.mean(), error)
    return float(low), float(high), 2 * float(stats.t.sf(abs(means.mean()) / error, len(means) - 1))


def _bootstrap(values: np.ndarray) -> np.ndarray:
    """Means of `DRAWS` draws of seeds and units; the same for the same values."""
    rng = np.random.default_rng(0)
    seeds = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), DRAWS)
    # Units with equal values in every seed are drawn together: most pictures never differ.
    kinds, counts = np.unique(values, axis=1, return_counts=True)
    chances = counts / counts.sum()
    means = np.empty(DRAWS)
    for start in range(0, DRAWS, 500):
        part = slice(start, start + 500)
        units = rng.multinomial(values.shape[1], chances, len(means[part]))
        means[part] = np.einsum("ds,sk,dk->d", seeds[part], kinds, units, optimize=True)
    return means / values.size


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`[seeds, 1]` rank correlations over the units of each seed."""
    return np.array([[stats.spearmanr(*pair)[0]] for pair in zip(first, second)])


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values after Holm's correction for everything that was named beforehand."""
    order = np.argsort(p_values)
    adjusted, least = np.empty(len(order)), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted.tolist()


def word(estimate: Estimate, delta: float) -> str:
    """`holds` above zero and at least `delta`; `refuted` surely below `delta`; else `open`."""
    if estimate.low > 0 and estimate.value >= delta and estimate.p < 1 - LEVEL:
        return "holds"
    return "refuted" if estimate.high < delta else "open"
