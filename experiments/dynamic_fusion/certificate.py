"""Searches for alpha against a dense scan in float64: how far from the global minimum they end."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_HIGH, _POINTS = 2.0, 201


class Certificate:
    """Collects rows. Each search is judged by what it minimises: `jeffreys` and `project` by their
    own objectives, others by the paper's."""

    def __init__(self) -> None:
        self._excess: dict[str, list[float]] = {}
        self._minima: dict[str, list[float]] = {}
        self._flagged: dict[str, list[bool]] = {}
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def add(
        self, large: Any, expert: Any, base: Any, found: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Rows of logits `[n, vocab]`, and what each search says of them (of more, perhaps)."""
        logits = [np.asarray(values, np.float64) for values in (large, expert, base)]
        for i, row in enumerate(zip(*logits, strict=True)):
            self._rows += 1
            reference = Reference(*row)
            values = np.linspace(0, _HIGH, _POINTS)
            scan = [reference.at(float(a)) for a in values]
            best: dict[Objective, float] = {}
            for name, info in found.items():
                objective = OBJECTIVES.get(name, papers)
                if objective not in best:
                    best[objective] = _global_minimum(reference, objective, values, scan)
                at = reference.at(float(info["alpha"][0, i]))
                excess = objective(at, reference) - best[objective]
                self._excess.setdefault(name, []).append(excess)
                self._minima.setdefault(name, []).append(best[objective])
                flagged = not bool(info["converged"][i])
                self._flagged.setdefault(name, []).append(flagged)

    def table(self) -> dict[str, dict[str, float]]:
        """By search: rows at the global minimum, to 1e-6 or a hundred-thousandth of it, which is
        what `converged` says; whether the others are flagged; the largest excess of all."""
        table = {}
        for name, values in self._excess.items():
            good = np.array(values) <= np.maximum(1e-6, 1e-5 * np.array(self._minima[name]))
            flagged = np.array(self._flagged[name])
            table[name] = {
                "rows": len(values),
                "at the minimum %": 100 * float(good.mean()),
                "flagged %": 100 * float(flagged.mean()),
                "others unflagged": int((~good & ~flagged).sum()),
                "largest excess": float(max(values)),
            }
        return table


class Point(NamedTuple):
    """Alpha, KL(fused || large), KL(large || fused), and log E_P[(expert / base)^alpha]."""

    alpha: float
    forward: float
    reverse: float
    log_z: float


class Reference:
    """One row in float64: `forward` is KL(expert || base), `reverse` KL(base || expert)."""

    def __init__(self, large: np.ndarray, expert: np.ndarray, base: np.ndarray):
        p, q, r = (_normal(x) for x in (large, expert, base))
        d = q - r
        self.forward, self.reverse = float((np.exp(q) * d).sum()), float(-(np.exp(r) * d).sum())
        self._lead = float((np.exp(p) * d).sum())
        # The rest is below 1e-12 of the probability at any alpha.
        kept = np.maximum(p, p + _HIGH * (d - self._lead)) > -38
        self._p, self._d = p[kept], d[kept]

    def at(self, alpha: float) -> Point:
        x = self._p + alpha * self._d
        peak = x.max()
        weight = np.exp(x - peak)
        total = weight.sum()
        log_z = float(peak + np.log(total))
        forward = float(alpha * (weight @ self._d) / total - log_z)
        return Point(alpha, forward, log_z - alpha * self._lead, log_z)


Objective = Callable[[Point, Reference], float]


def papers(at: Point, row: Reference) -> float:
    """Equation 3."""
    return (at.forward - row.forward) ** 2 + (at.reverse - row.reverse) ** 2


def _jeffreys(at: Point, row: Reference) -> float:
    return (at.forward + at.reverse - row.forward - row.reverse) ** 2


def _project(at: Point, row: Reference) -> float:
    """Its convex dual."""
    return at.log_z - at.alpha * row.forward


OBJECTIVES: dict[str, Objective] = {
    "jeffreys": _jeffreys,
    "project": _project,
}


def _global_minimum(
    row: Reference, objective: Objective, values: np.ndarray, scan: Sequence[Point]
) -> float:
    """The best of the scan, and of its three best points polished."""
    from scipy import optimize

    seen = np.array([objective(at, row) for at in scan])
    best, step = float(seen.min()), float(values[1] - values[0])
    for k in np.argsort(seen)[:3]:
        polished: Any = optimize.minimize_scalar(
            lambda a: objective(row.at(float(a)), row),
            bounds=(max(values[k] - step, 0), min(values[k] + step, _HIGH)),
            method="bounded",
            options={"xatol": 1e-9},
        )
        best = min(best, float(polished.fun))
    return best


def _normal(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())
