"""Searches for alpha against a dense scan in float64: how far from the global minimum they end."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_HIGH, _POINTS = 2.0, 201

# Alpha to KL(fused || large) and KL(large || fused); None to those of expert and base.
_Divergences = Callable[[float | None], tuple[float, float]]


class Certificate:
    """Collects rows. `jeffreys` is judged by its own objective, ``(F + R - targets)^2``, others by
    the paper's."""

    def __init__(self) -> None:
        self._excess: dict[str, list[float]] = {}
        self._flagged: dict[str, list[bool]] = {}
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def add(
        self, large: Any, expert: Any, base: Any, found: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Rows of logits ``[n, vocab]``, and what each search says of them (of more, perhaps)."""
        logits = [np.asarray(values, np.float64) for values in (large, expert, base)]
        for i, row in enumerate(zip(*logits, strict=True)):
            self._rows += 1
            divergences = reference(*row)
            targets = divergences(None)
            values = np.linspace(0, _HIGH, _POINTS)
            scan = [divergences(float(a)) for a in values]
            for own in (False, True):
                names = [name for name in found if (name == "jeffreys") == own]
                if not names:
                    continue

                objective = functools.partial(_objective, targets=targets, summed=own)
                best = _global_minimum(divergences, objective, values, scan)
                for name in names:
                    alpha = float(found[name]["alpha"][0, i])
                    self._excess.setdefault(name, []).append(objective(divergences(alpha)) - best)
                    flagged = not bool(found[name]["converged"][i])
                    self._flagged.setdefault(name, []).append(flagged)

    def table(self) -> dict[str, dict[str, float]]:
        """By search: rows within 1e-6 of the global minimum, and whether the others are flagged."""
        table = {}
        for name, values in self._excess.items():
            good, flagged = np.array(values) <= 1e-6, np.array(self._flagged[name])
            table[name] = {
                "rows": len(values),
                "within 1e-6 %": 100 * float(good.mean()),
                "flagged %": 100 * float(flagged.mean()),
                "others unflagged": int((~good & ~flagged).sum()),
                "largest excess": float(max(values)),
            }
        return table


def _objective(at: tuple[float, float], *, targets: tuple[float, float], summed: bool) -> float:
    gaps = [x - y for x, y in zip(at, targets, strict=True)]
    return sum(gaps) ** 2 if summed else sum(gap**2 for gap in gaps)


def _global_minimum(
    divergences: _Divergences,
    objective: Callable[[tuple[float, float]], float],
    values: np.ndarray,
    scan: Sequence[tuple[float, float]],
) -> float:
    """The best of the scan, and of its three best points polished."""
    from scipy import optimize

    seen = np.array([objective(at) for at in scan])
    best, step = float(seen.min()), float(values[1] - values[0])
    for k in np.argsort(seen)[:3]:
        polished: Any = optimize.minimize_scalar(
            lambda a: objective(divergences(a)),
            bounds=(max(values[k] - step, 0), min(values[k] + step, _HIGH)),
            method="bounded",
            options={"xatol": 1e-9},
        )
        best = min(best, float(polished.fun))
    return best


def reference(large: np.ndarray, expert: np.ndarray, base: np.ndarray) -> _Divergences:
    """Both divergences of one row, along alpha."""

    def normal(x: np.ndarray) -> np.ndarray:
        x = x - x.max()
        return x - np.log(np.exp(x).sum())

    p, q, r = normal(large), normal(expert), normal(base)
    d = q - r
    targets = float((np.exp(q) * d).sum()), float(-(np.exp(r) * d).sum())
    lead = float((np.exp(p) * d).sum())
    # The rest is below 1e-12 of the probability at any alpha.
    kept = np.maximum(p, p + _HIGH * (d - lead)) > -38
    p, d = p[kept], d[kept]

    def divergences(alpha: float | None) -> tuple[float, float]:
        if alpha is None:
            return targets
        x = p + alpha * d
        peak = x.max()
        weight = np.exp(x - peak)
        total = weight.sum()
        log_z = peak + np.log(total)
        return float(alpha * (weight @ d) / total - log_z), float(log_z - alpha * lead)

    return divergences
