"""Rows of logits for the searches of `DynamicFusion`, and float64 oracles in numpy.

A case is a batch of rows. Of every method it is asked how many rows are not called converged, are
worse than the paper's grid of 21 points, are called converged although the equation does not hold
(the root searches), or have an interval without the exact alpha. What float32 may make of the
divergences is allowed for.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.shared import suite
from logitjax.fusion import DynamicFusion
from tests.rigs import _tables

KINDS = _tables.read("guarantees.toml")["fusion"]
METHODS = ("grid", "jeffreys", "project")
ROWS = 1000
_HIGH, _GRID, _POINTS = 2.0, 21, 100_000
# Rows of a batch by the size of a language's vocabulary.
_VOCABULARIES = {"V = 4,096": (100, 4096), "V = 32,000": (20, 32_000), "V = 150,000": (5, 150_000)}
# psi(x) / x^2 = (e^x - 1 - x) / x^2.
_PSI = [1 / math.factorial(k) for k in range(20, 1, -1)]
# Terms of a sum, and what they are products of, that float32 flushes to zero: a few of its smallest
# normal number for each token. Targets below are 0 to it.
_FLUSHED = 100 * float(np.finfo(np.float32).tiny)
_FAILURES = ("unconverged", "worse", "false", "NaN", "outside", "whole range")

Logits = tuple[np.ndarray, np.ndarray, np.ndarray]


def run(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """One entry a batch and method: how many rows fail."""
    rng = np.random.default_rng(seed)
    entries = []
    for _ in range(count):
        entries += _batch(draw(kind, _VOCABULARIES.get(kind, (ROWS, 0))[0], rng))
    return entries


def draw(kind: str, rows: int, rng: np.random.Generator) -> Logits:
    """Logits `[rows, vocab]` of a large model, an expert and its base, in float32."""
    if kind in ("zipf", "nearly equal", *_VOCABULARIES):
        large, expert, base = _language(rng, rows, _VOCABULARIES.get(kind, (0, 256))[1])
        if kind == "nearly equal":
            size = 10.0 ** rng.uniform(-6, -1, (rows, 1))
            expert = base + size * rng.normal(size=base.shape)
            large = np.where(rng.random((rows, 1)) < 0.5, base, large)
    else:
        scale = rng.uniform(1, 8, (rows, 1))
        freedom = rng.choice([1.5, 2.0, 3.0, 5.0], (rows, 1))
        vocab = 10 if kind == "V = 10" else 24
        large, expert, base = (scale * rng.standard_t(freedom, (rows, vocab)) for _ in range(3))
    if kind == "peaked":
        for values in (large, expert, base):
            values[np.arange(rows), rng.integers(0, 24, rows)] += rng.uniform(10, 60, rows)
    elif kind == "ties":
        large, expert, base = (np.round(x / 4) for x in (large, expert, base))
    elif kind == "-inf entries":
        for values in (large, expert, base):
            values[rng.random(values.shape) < 0.1] = -np.inf
            values[:, 0] = np.where(np.isfinite(values[:, 0]), values[:, 0], 0.0)
    elif kind == "offsets":
        large, expert, base = (x + rng.uniform(-2e4, 2e4, (rows, 1)) for x in (large, expert, base))
    return large.astype(np.float32), expert.astype(np.float32), base.astype(np.float32)


def _language(rng: np.random.Generator, rows: int, vocab: int) -> list[np.ndarray]:
    """Zipf's law with noise and a few likely tokens, on which the models agree on the whole."""
    common = rng.permuted(np.tile(-1.2 * np.log(np.arange(1, vocab + 1)), (rows, 1)), axis=1)
    large, base = (common + rng.normal(size=common.shape) for _ in range(2))
    row = np.arange(rows)[:, None]
    peaks = rng.integers(0, vocab, (rows, 3))
    for values in (large, base):
        values[row, peaks] += rng.uniform(2, 8, (rows, 3))
    expert = base + 0.5 * rng.normal(size=common.shape)
    expert[row, rng.integers(0, vocab, (rows, 2))] += rng.uniform(0, 12, (rows, 2))
    return [large, expert, base]


class Path64(NamedTuple):
    """Rows in float64, by sums without subtractions: log P, centred directions, and the targets."""

    log_p: np.ndarray
    directions: np.ndarray
    forward: np.ndarray
    reverse: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, logits: Logits) -> "Path64":
        exists = np.isfinite(logits).all(0)
        p, q, r = (_normal(np.where(exists, np.float64(x), -np.inf)) for x in logits)
        difference = np.where(exists, np.where(exists, q, 0) - np.where(exists, r, 0), 0.0)
        h, expert = (_centred(x, np.where(exists, difference, 0)) for x in (p, r))
        nothing = np.zeros(len(h))
        forward, reverse, mean = cls(r, expert, *[nothing] * 3).at(np.ones(len(h)))
        apart = (np.exp(r) * h).sum(-1)
        return cls(p, h, forward, reverse, mean + apart)

    def at(self, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """KL(P_a || P), KL(P || P_a) and the mean of the direction, at an alpha a row."""
        x = alpha[:, None] * self.directions
        peak = np.maximum((self.log_p + x).max(-1), 0.0)[:, None]
        weights, base_weights = np.exp(self.log_p + x - peak), np.exp(self.log_p - peak)
        with np.errstate(over="ignore", invalid="ignore"):
            series = x * x * np.polyval(_PSI, np.clip(x, -1, 1))
            near = np.abs(x) < 1
            psi = np.where(near, base_weights * series, weights - base_weights * (1 + x))
            moved = self.directions * np.where(
                near, base_weights * (x + series), weights - base_weights
            )
        psi, peak = psi.sum(-1), peak[:, 0]
        total = np.exp(-peak) + psi
        mean = moved.sum(-1) / total
        small = psi * np.exp(np.minimum(peak, 300)) < 1
        log_z = np.where(small, np.log1p(psi * np.exp(np.minimum(peak, 300))), np.log(total) + peak)
        return alpha * mean - log_z, log_z, mean

    @property
    def scale(self) -> np.ndarray:
        return self.forward**2 + self.reverse**2

    def objective(self, alpha: np.ndarray) -> np.ndarray:
        forward, reverse, _ = self.at(alpha)
        return (forward - self.forward) ** 2 + (reverse - self.reverse) ** 2

    def excess(self, method: str, alpha: np.ndarray) -> np.ndarray:
        """Value less target of a root search: grows with alpha."""
        forward, reverse, mean = self.at(alpha)
        return {
            "jeffreys": forward + reverse - self.forward - self.reverse,
            "project": mean - self.mean,
        }[method]

    def root(self, method: str) -> np.ndarray:
        low, high = np.zeros(len(self.mean)), np.full(len(self.mean), _HIGH)
        for _ in range(50):
            middle = (low + high) / 2
            below = self.excess(method, middle) < 0
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    def optimum(self) -> tuple[np.ndarray, np.ndarray]:
        """The best of 100,001 points a row, and its objective."""
        # Both divergences grow: cells of the grid whose ends exclude anything better are left out.
        answers = []
        for i in range(len(self.mean)):
            row = Path64(*(x[i : i + 1] for x in self))
            best, index, width, starts = np.inf, 0, 1000, np.arange(0, _POINTS, 1000)
            while width:
                points = np.unique(np.concatenate([starts, starts + width]))
                paths = Path64(*(np.broadcast_to(x, (len(points), *x.shape[1:])) for x in row))
                forward, reverse, _ = paths.at(points * (_HIGH / _POINTS))
                gaps = np.stack([forward - row.forward, reverse - row.reverse])
                values = np.square(gaps).sum(0)
                if values.min() < best:
                    best, index = values.min(), int(points[values.argmin()])
                left, right = (
                    gaps[:, np.searchsorted(points, x)] for x in (starts, starts + width)
                )
                bound = np.square(np.maximum(np.maximum(left, -right), 0)).sum(0)
                # In float64 neighbours may not grow.
                open_cells = starts[bound <= best * (1 + 1e-9)]
                width //= 10
                starts = (open_cells[:, None] + width * np.arange(10)).reshape(-1)
            answers.append((index * (_HIGH / _POINTS), best))
        return tuple(np.array(answers).T)

    def rounding(self, alpha: np.ndarray) -> np.ndarray:
        """The float32 error of a divergence: a share of it, small or large."""
        forward, reverse, _ = self.at(alpha)
        return 1e-4 * (forward + reverse + self.forward + self.reverse)


def _centred(log_p: np.ndarray, values: np.ndarray) -> np.ndarray:
    for _ in range(2):
        values = values - (np.exp(log_p) * values).sum(-1, keepdims=True)
    return np.where(np.isfinite(log_p), values, 0.0)


def _normal(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _batch(logits: Logits) -> list[dict[str, Any]]:
    path, rows = Path64.of(logits), len(logits[0])
    best = path.optimum()
    return [
        {"method": method, "rows": rows}
        | judge(path, method, jax.device_get(_search(method)(*logits)), best)
        for method in METHODS
    ]


def judge(
    path: Path64, method: str, info: Any, best: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """Rows that fail, by how; `best` is the optimum of the dense grid and its objective."""
    alpha, lower, upper = (np.asarray(info[x][0], np.float64) for x in ("alpha", "lower", "upper"))
    converged = np.asarray(info["converged"])
    counts: dict[str, Any] = {"unconverged": int((~converged).sum())}
    counts["NaN"] = int(np.isnan([alpha, lower, upper]).any(0).sum())
    grid = np.linspace(0, _HIGH, _GRID)
    rounding = path.rounding(alpha)
    if method == "grid":
        answer, reached = best[0], path.objective(alpha)
        allowed = 1e-5 * reached + 1e-8 * path.scale + 4 * np.sqrt(reached) * rounding + rounding**2
        coarse = np.min([path.objective(np.full(len(alpha), a)) for a in grid], 0)
        worse, false = reached > coarse + allowed, np.zeros(len(alpha), bool)
    else:
        target = {"jeffreys": path.forward + path.reverse}.get(method, path.forward)
        answer = path.root(method)
        # A mean is rounded by a share of the largest.
        rounding = rounding + (1e-5 * np.abs(path.directions).max(-1) if method == "project" else 0)
        allowed = 1e-4 * target + 2 * rounding + _FLUSHED * path.log_p.shape[-1]
        # The root of the float32 function lies between neighbours of alpha.
        below, above = (
            path.excess(method, np.clip(alpha * (1 + step), 0, _HIGH)) for step in (-4e-7, 4e-7)
        )
        met = ((below <= allowed) | (alpha <= 0)) & ((above >= -allowed) | (alpha >= _HIGH))
        gap = np.abs(path.excess(method, alpha))
        coarse = np.min([np.abs(path.excess(method, np.full(len(alpha), a))) for a in grid], 0)
        worse, false = (gap > coarse + allowed) & ~met, ~met
    # A minimum lies beside the best point of the dense grid; a root is bisected.
    reach = _HIGH / _POINTS if method == "grid" else 1e-9
    outside = (answer < lower - reach) | (answer > upper + reach)
    counts |= {"worse": int(worse.sum()), "false": int((false & converged).sum())}
    counts["outside"] = int(outside.sum())
    return (
        counts
        | {"whole range": int((upper - lower >= _HIGH).sum())}
        | {"width": float(np.median(upper - lower))}
    )


@functools.cache
def _search(method: Any) -> Callable[..., Any]:
    return jax.jit(lambda *logits: DynamicFusion(method=method)(*logits)[1])


def report(cases: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    """A row a kind and method, and the promises."""
    rows, bars = [], []
    for method in METHODS:
        every = [case for case in cases if case["method"] == method]
        for kind in dict.fromkeys(case["kind"] for case in every):
            some = [case for case in every if case["kind"] == kind]
            rows.append({"area": "fusion", "kind": kind, "method": method} | _summed(some))
        totals = _summed(every)
        name = f"fusion, {totals['rows']:,} rows, {method}"
        bars += [
            suite.at_most(f"{name}: worse than 21 points", totals["worse"], 0),
            suite.at_most(f"{name}: false certificates", totals["false"], 0),
            suite.at_most(f"{name}: NaN", totals["NaN"], 0),
            suite.at_most(f"{name}: intervals without the dense optimum", totals["outside"], 0),
            suite.at_most(
                f"{name}: share not converged", totals["unconverged"] / totals["rows"], 1e-3
            ),
        ]
    return rows, bars


def _summed(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    widths = [case["width"] for case in cases]
    return {name: suite.total(cases, name) for name in ("rows", *_FAILURES)} | {
        "median width": float(np.median(widths))
    }
