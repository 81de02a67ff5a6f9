"""Rows of logits for the searches of `DynamicFusion`, and float64 oracles in numpy.

A case is a batch of rows. Of every method it is asked how many rows are not called converged, are
worse than the paper's grid of 21 points, or are called converged although a dense scan of alpha
finds better (`newton`) or the equation does not hold (the root searches). What float32 may make of
the divergences is allowed for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.shared import suite
from logitjax.fusion import DynamicFusion

# Kind: batches at smoke and at full scale. Together 100,000 rows.
KINDS = {
    "student t": (1, 40),
    "zipf": (1, 20),
    "peaked": (1, 8),
    "ties": (1, 8),
    "-inf entries": (1, 8),
    "offsets": (1, 8),
    "nearly equal": (1, 8),
}
METHODS = ("newton", "jeffreys", "project")
ROWS = 1000
_HIGH, _GRID = 2.0, 21
_FAILURES = ("unconverged", "worse", "false", "NaN")

Logits = tuple[np.ndarray, np.ndarray, np.ndarray]


def run(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """One entry a batch and method: how many rows fail."""
    rng = np.random.default_rng(seed)
    entries = []
    for _ in range(count):
        entries += _batch(draw(kind, ROWS, rng))
    return entries


def draw(kind: str, rows: int, rng: np.random.Generator) -> Logits:
    """Logits `[rows, vocab]` of a large model, an expert and its base, in float32."""
    if kind in ("zipf", "nearly equal"):
        large, expert, base = _language(rng, rows, 256)
        if kind == "nearly equal":
            size = 10.0 ** rng.uniform(-6, -1, (rows, 1))
            expert = base + size * rng.normal(size=base.shape)
            large = np.where(rng.random((rows, 1)) < 0.5, base, large)
    else:
        scale = rng.uniform(1, 8, (rows, 1))
        freedom = rng.choice([1.5, 2.0, 3.0, 5.0], (rows, 1))
        large, expert, base = (scale * rng.standard_t(freedom, (rows, 24)) for _ in range(3))
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
    """Rows in float64: log P, centred directions, and the targets."""

    log_p: np.ndarray
    directions: np.ndarray
    forward: np.ndarray
    reverse: np.ndarray
    gain: np.ndarray

    @classmethod
    def of(cls, logits: Logits) -> "Path64":
        exists = np.isfinite(logits).all(0)
        p, q, r = (_normal(np.where(exists, np.float64(x), -np.inf)) for x in logits)
        difference = np.where(exists, np.where(exists, q, 0) - np.where(exists, r, 0), 0.0)
        forward, reverse = ((np.exp(x) * difference).sum(-1) for x in (q, r))
        gain = (np.exp(p) * difference).sum(-1)
        return cls(p, difference - gain[:, None], forward, -reverse, gain)

    def at(self, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """KL(P_a || P), KL(P || P_a) and the mean of the direction, at an alpha a row."""
        x = self.log_p + alpha[:, None] * self.directions
        peak = x.max(-1)
        weights = np.exp(x - peak[:, None])
        total = weights.sum(-1)
        mean = (weights * self.directions).sum(-1) / total
        log_z = peak + np.log(total)
        return alpha * mean - log_z, log_z, mean

    def objective(self, alpha: np.ndarray) -> np.ndarray:
        forward, reverse, _ = self.at(alpha)
        return (forward - self.forward) ** 2 + (reverse - self.reverse) ** 2

    def excess(self, method: str, alpha: np.ndarray) -> np.ndarray:
        """Value less target of a root search: grows with alpha."""
        forward, reverse, mean = self.at(alpha)
        return {
            "jeffreys": forward + reverse - self.forward - self.reverse,
            "project": mean + self.gain - self.forward,
        }[method]

    def rounding(self, alpha: np.ndarray) -> np.ndarray:
        """What float32 may make of a divergence."""
        _, reverse, mean = self.at(alpha)
        return 1e-6 * (1 + np.abs(reverse) + np.abs(alpha * mean) + np.abs(self.gain))


def _normal(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _batch(logits: Logits) -> list[dict[str, Any]]:
    path, rows = Path64.of(logits), len(logits[0])
    points = 401 if logits[0].shape[1] > 100 else 2001
    scan = [path.objective(np.full(rows, a)) for a in np.linspace(0, _HIGH, points)]
    return [
        {"method": method, "rows": rows}
        | judge(path, method, jax.device_get(_search(method)(*logits)), np.array(scan))
        for method in METHODS
    ]


def judge(path: Path64, method: str, info: Any, scan: np.ndarray | None) -> dict[str, int]:
    """Rows that fail, by how. `scan` is the objective `[points, rows]` over the range, dense."""
    alpha = np.asarray(info["alpha"][0], np.float64)
    converged = np.asarray(info["converged"])
    counts = {"unconverged": int((~converged).sum()), "NaN": int(np.isnan(alpha).sum())}
    grid = np.linspace(0, _HIGH, _GRID)
    rounding = path.rounding(alpha)
    if method == "newton":
        assert scan is not None
        found = path.objective(alpha)
        allowed = 1e-6 + 1e-5 * found + 4 * np.sqrt(found) * rounding + rounding**2
        coarse = scan[:: (len(scan) - 1) // (_GRID - 1)].min(0)
        worse, false = found > coarse + allowed, found > scan.min(0) + allowed
    else:
        target = {"jeffreys": path.forward + path.reverse}.get(method, path.forward)
        allowed = 1e-4 * np.maximum(target, 1e-2) + 2 * rounding
        # The root of the float32 function lies between neighbours of alpha.
        below, above = (
            path.excess(method, np.clip(alpha * (1 + step), 0, _HIGH)) for step in (-4e-7, 4e-7)
        )
        met = ((below <= allowed) | (alpha <= 0)) & ((above >= -allowed) | (alpha >= _HIGH))
        gap = np.abs(path.excess(method, alpha))
        coarse = np.min([np.abs(path.excess(method, np.full(len(alpha), a))) for a in grid], 0)
        worse, false = (gap > coarse + allowed) & ~met, ~met
    return counts | {"worse": int(worse.sum()), "false": int((false & converged).sum())}


@functools.cache
def _search(method: Any) -> Callable[..., Any]:
    """What a search says of logits."""
    return jax.jit(lambda *logits: DynamicFusion(method=method)(*logits)[1])


def report(cases: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    """A row a kind and method, and the promises."""
    rows, bars = [], []
    for method in METHODS:
        every = [case for case in cases if case["method"] == method]
        for kind in dict.fromkeys(case["kind"] for case in every):
            some = [case for case in every if case["kind"] == kind]
            rows.append({"area": "fusion", "kind": kind, "method": method} | _summed(some))
        found = _summed(every)
        name = f"fusion, {found['rows']:,} rows, {method}"
        bars += [
            suite.at_most(f"{name}: worse than 21 points", found["worse"], 0),
            suite.at_most(f"{name}: false certificates", found["false"], 0),
            suite.at_most(f"{name}: NaN", found["NaN"], 0),
            suite.at_most(
                f"{name}: share not converged", found["unconverged"] / found["rows"], 1e-3
            ),
        ]
    return rows, bars


def _summed(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: suite.total(cases, name) for name in ("rows", *_FAILURES)}
