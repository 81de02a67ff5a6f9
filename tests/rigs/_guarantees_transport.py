"""Cases for the bounds of `logitjax.transport`, and their float64 oracles in numpy.

A case is two graphs, options of `certificate`, and couplings whose cost is worked out in float64.
No coupling may cost less than `lower`; the coupling that is returned may not cost more than
`upper`; where all permutations can be tried, `lower` is held against the best of them. What
rounding bounds cost is the distance of `lower` from the same bound by numpy in float64, as a share
of the gap.
"""

import functools
import importlib.util
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import scipy.optimize

from experiments.shared import suite
from logitjax import transport
from logitjax.transport import FactoredGraph
from tests.rigs import _tables

_TABLE = _tables.read("guarantees.toml")
_NUMBERS = _TABLE["transport_numbers"]
KINDS = _TABLE["transport"] | _NUMBERS
_SHAPES = ((1, 1), (2, 1), (3, 2), (6, 4), (7, 4), (12, 30), (40, 16))
_FEW = ((6, 4), (12, 30))
_LARGE = ((600, 40), (3_000, 16), (5_000, 8), (8_192, 8))
_THIRD = ((3, 2), (6, 4), (7, 4), (16, 20))


def run(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """One row a case: bounds, oracles, and the case itself in short."""
    rng = np.random.default_rng(seed)
    return [_case(kind, rng) for _ in range(count)]


def _case(kind: str, rng: np.random.Generator) -> dict[str, Any]:
    shapes = _LARGE if kind == "large" else _THIRD if "third" in kind else _SHAPES
    # Kinds of numbers need fewer shapes, each of which is a program.
    shapes = _FEW if kind in _NUMBERS else shapes
    n, positions = shapes[rng.integers(len(shapes))]
    if kind == "third, 512":
        n, positions = 512, 64
    if kind == "plans":
        return _plan_case(rng)
    wide = kind.startswith(("magnitudes", "float64"))
    p = 1 if "p = 1" in kind else 2
    noise = 10.0 ** rng.uniform(-12 if wide or "repeated" in kind else -7, 0)
    exponents = (-38, 38) if kind == "extreme scale" else (-9, 9)
    # One of two is drawn where all of it can be measured, so that not most are refused.
    if "magnitudes" in kind and rng.random() < 0.5:
        exponents = (-300, 300)
    scale = 10.0 ** rng.uniform(*exponents)
    z = _factor(rng, positions, n)
    if "repeated" in kind:
        z = z[:, rng.integers(0, max(1, n // 3), n)]
    order = rng.permutation(n) if rng.random() < 0.5 else np.arange(n)
    other = (z + noise * rng.normal(size=z.shape))[:, order]
    if rng.random() < 0.2:  # nothing to do with each other
        other = _factor(rng, positions, n)
    weights: dict[str, Any] = {}
    if "weights" in kind:
        a = rng.dirichlet(np.full(n, 0.5)).astype(np.float32)
        b = a[order] if rng.random() < 0.5 else rng.dirichlet(np.ones(n)).astype(np.float32)
        weights = {"c_weights": a / a.sum(), "d_weights": b / b.sum()}
    real = np.float64 if wide else np.float32
    factored = (
        kind.startswith(("factored", "large"))
        or ", factored" in kind
        or ("third" in kind and "weights" not in kind and rng.random() < 0.7)
    )
    if factored:
        z, other = ((x * math.sqrt(scale)).astype(real) for x in (z, other))
        graphs = FactoredGraph(z), FactoredGraph(other)
        c, d = (_gram(x) for x in (z, other))
    else:
        graphs = tuple((scale * _gram(x)).astype(real) for x in (z, other))
        if rng.random() < 0.5:  # not symmetric, of any sign
            graphs = tuple((g - g.max() * rng.random(g.shape) ** 4).astype(real) for g in graphs)
        if "magnitudes" in kind and rng.random() < 0.5:  # Unlike in size as well.
            graphs = (graphs[0], graphs[1] * 10.0 ** rng.uniform(-4, 300 - abs(math.log10(scale))))
        c, d = (g.astype(np.float64) for g in graphs)
    case: dict[str, Any] = {"n": n, "p": p, "noise": noise, "log10 scale": math.log10(scale)}
    identity = _coupling(np.argsort(order), weights) if not weights else None
    options: dict[str, Any] = {"p": p, "candidates": () if identity is None else (identity,)}
    options["bounds"] = "third" if "third" in kind else "cheap"
    if kind.startswith("separate"):
        options["scale"] = "separate"
    elif "magnitudes" in kind:
        options["scale"] = ("joint", "none")[rng.integers(2)]
    try:
        if kind == "float64, jit":
            answer = _certificate(True)(*map(_split, graphs), **weights, **options)
        elif kind == "float64, jit, closed over":
            answer = jax.jit(lambda key: transport.certificate(*graphs, key=key, **options))(
                jax.random.key(0)
            )
        elif kind == "many":
            del options["candidates"]
            pairs: Any = [graphs, graphs[::-1]]
            both = transport.certificate_many(pairs, **options)
            answer = jax.tree.map(lambda x: x[0], both)
        else:
            answer = _certificate("jit" in kind)(*graphs, **weights, **options)
    except ValueError as error:
        return case | {"refused": str(error)}
    return case | judge(answer, c, d, weights, p, factored and not weights, options["bounds"])


def _split(graph: Any) -> tuple[Any, Any]:
    """float64 as two numbers of float32, which JAX leaves alone."""
    if isinstance(graph, FactoredGraph):
        high, low = _split(graph.values)
        return FactoredGraph(high), FactoredGraph(low)
    high = graph.astype(np.float32)
    return high, (graph - high).astype(np.float32)


def _plan_case(rng: np.random.Generator) -> dict[str, Any]:
    """A plan of a solver, spoilt by up to a thousandth, beside its repair in float64."""
    n, positions = ((16, 8), (24, 12), (32, 16))[rng.integers(3)]
    c, d = (_gram(np.abs(_factor(rng, positions, n)) + 0.1) for _ in range(2))
    c, d = c / c.max(), d / d.max()
    solver = "POT" if rng.random() < 0.5 and importlib.util.find_spec("ot") else "ott"
    if solver == "POT":
        import ot

        uniform = np.full(n, 1 / n)
        plan = ot.gromov.gromov_wasserstein(c, d, uniform, uniform, loss_fun="square_loss")
    else:
        plan = np.float64(_ott()(c, d))
    error = 10.0 ** rng.uniform(-7, -3)
    plan = plan * (1 + error * rng.uniform(-1, 1, (n, 1)))
    case = {"n": n, "p": 2, "noise": error, "solver": solver}
    if not np.abs(plan.sum(0) - 1 / n).sum() + np.abs(plan.sum(1) - 1 / n).sum() <= 2e-3:
        return case | {"refused": "the solver's plan has other marginals"}
    answer = transport.certificate(c, d, scale="none", candidates=[plan])
    plan = plan * np.minimum(1, 1 / n / plan.sum(1))[:, None]
    plan = plan * np.minimum(1, 1 / n / plan.sum(0))
    rest = [np.maximum(1 / n - plan.sum(axis), 0) for axis in (1, 0)]
    plan = plan + np.outer(*rest) / max(rest[0].sum(), 1e-300)
    # Entry by entry, since a difference of squares would cancel.
    true = np.einsum("ijkl,ik,jl->", np.square(c[:, :, None, None] - d), plan, plan, optimize=True)
    got = float(answer.costs[0])
    lack = max(0.0, true * (1 - 1e-12) - got)
    return case | {
        "lower": float(answer.lower),
        "excess of lower": max(0.0, float(answer.lower) - true),
        "lack of upper": lack,
        "cost over repaired": got / true if true else 1.0,
    }


@functools.cache
def _ott() -> Any:
    """Plans of ott at its defaults but for epsilon, a hundredth of the squared entries."""
    from ott.geometry.geometry import Geometry
    from ott.problems.quadratic.quadratic_problem import QuadraticProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn
    from ott.solvers.quadratic.gromov_wasserstein import GromovWasserstein

    @jax.jit
    def solve(c: Any, d: Any) -> Any:
        problem = QuadraticProblem(Geometry(cost_matrix=c), Geometry(cost_matrix=d))
        return GromovWasserstein(Sinkhorn(), epsilon=1e-2)(problem).matrix

    return solve


def _factor(rng: np.random.Generator, positions: int, n: int) -> np.ndarray:
    kind = rng.integers(5)
    z = rng.normal(size=(positions, n))
    if kind == 1:
        z = np.where(rng.random(z.shape) < 0.3, np.abs(3 + 2 * z), 0.0)
    elif kind == 2:
        z = -np.sort(-z - 3)
    elif kind == 3:
        z = np.exp(2 * z)
    elif kind == 4:
        z = np.ones_like(z) * rng.normal() if rng.random() < 0.5 else np.zeros_like(z)
    return z


def _gram(z: np.ndarray) -> np.ndarray:
    z = np.asarray(z, np.float64)
    return z.T @ z


def _coupling(columns: np.ndarray, weights: Any) -> Any:
    # `sorted_coupling` of places is the matching, without its class being public.
    places = np.empty(len(columns), np.float32)
    places[columns] = np.arange(len(columns))
    return transport.sorted_coupling(np.arange(len(columns), dtype=np.float32), places)


@functools.cache
def _certificate(traced: bool) -> Any:
    if not traced:
        return transport.certificate
    return jax.jit(transport.certificate, static_argnames=("p", "scale", "bounds", "refine"))


def judge(
    answer: Any,
    c: np.ndarray,
    d: np.ndarray,
    weights: dict[str, Any],
    p: int,
    matching: bool,
    bounds: str,
) -> dict[str, Any]:
    """Violations of an answer in units of it, and what its rounding bounds cost."""
    lower, upper = float(answer.lower), float(answer.upper)
    units = [float(x) for x in answer.units]
    if not (math.isfinite(lower) and math.isfinite(upper) and 0 < min(units) < math.inf):
        return {"nan": True, "lower": lower, "upper": upper}
    c, d = c / units[0], d / units[1]
    n, m = len(c), len(d)
    a, b = (
        np.full(k, 1 / k) if weights.get(name) is None else np.float64(weights[name])
        for k, name in ((n, "c_weights"), (m, "d_weights"))
    )
    a, b = a / a.sum(), b / b.sum()
    plan = answer.coupling
    reached = cost(c, d, np.asarray(plan.rows), np.asarray(plan.columns), np.asarray(plan.mass), p)
    best = reached
    if n == m and n <= 6 and not weights:
        every = np.array(list(itertools.permutations(range(n))))
        moved = d[every[:, :, None], every[:, None, :]]
        best = min(best, (np.abs(c - moved) ** p).mean((1, 2)).min())
    # Masses are returned in float32: with weights the coupling is only as exact as that. The
    # oracle's own entries are off by a few units of float64.
    slack = 1e-9 if not weights else 1e-6
    tiny = 1e-13 * max(np.abs(c).max(), np.abs(d).max(), 1.0)

    def beyond(low, high):
        low, high = (x ** (1 / p) for x in (low, high))
        return max(0.0, low - high * (1 + slack) - tiny)

    exact = bound(c, d, a, b, p, matching, bounds, bool(weights)) if n <= 600 else None
    row = {
        "lower": lower,
        "upper": upper,
        "reached": reached,
        "excess of lower": beyond(lower, best),
        "lack of upper": beyond(reached, upper) if not weights else 0.0,
    }
    if upper == 0 < reached:
        row["lack of upper"] = reached
    if exact is not None:
        row |= {
            "exact": exact,
            "gap": upper - exact,
            "above exact": max(0.0, lower - exact * (1 + 1e-9)),
        }
    return row


def cost(c, d, rows, columns, mass, p, block: int = 512) -> float:
    """The cost of a coupling, a few rows at a time."""
    total = 0.0
    mass = np.asarray(mass, np.float64)
    if len(rows) == len(c) == len(d) and np.allclose(mass, 1 / len(c), rtol=1e-3):
        mass = np.full(len(c), 1 / len(c))
    for start in range(0, len(rows), block):
        here = slice(start, start + block)
        difference = np.abs(c[rows[here]][:, rows] - d[columns[here]][:, columns]) ** p
        total += mass[here] @ (difference @ mass)
    return float(total)


def wasserstein(f, g, a, b, p) -> float:
    """Transport cost on the line, by quantile functions."""
    i, k = np.argsort(f), np.argsort(g)
    ends_f, ends_g = np.cumsum(a[i]), np.cumsum(b[k])
    ends = np.sort(np.concatenate([ends_f, ends_g]))
    starts = np.concatenate([[0.0], ends[:-1]])
    at = (starts + ends) / 2
    f = f[i][np.minimum(np.searchsorted(ends_f, at), len(f) - 1)]
    g = g[k][np.minimum(np.searchsorted(ends_g, at), len(g) - 1)]
    return float(np.sum((ends - starts) * np.abs(f - g) ** p))


def bound(c, d, a, b, p, matching, bounds, weighted) -> float | None:
    """The bounds of the documentation in float64; None for those whose oracle is a solver."""
    if p == 1:
        lower_bounds = [wasserstein(c @ a, d @ b, a, b, 1)]
    else:

        def rows(x, w):
            mean, square = x @ w, np.square(x) @ w
            spread = np.square(x - mean[:, None]) @ w
            return mean, np.sqrt(spread), np.sqrt(square)

        (mean, spread, rms), (mean_, spread_, rms_) = rows(c, a), rows(d, b)
        apart = wasserstein(mean, mean_, a, b, 2) + wasserstein(spread, spread_, a, b, 2)
        lower_bounds = [apart, wasserstein(rms, rms_, a, b, 2)]
    n = len(c)
    if matching and p == 2:
        off = ~np.eye(n, dtype=bool)

        def rest(x):
            others = x[off].reshape(n, n - 1) if n > 1 else np.zeros((n, 1))
            return others.mean(1), others.std(1), np.sqrt(np.square(others).mean(1))

        def apart_by(x, y):
            return np.square(np.sort(x) - np.sort(y)).sum()

        (mean, spread, rms), (mean_, spread_, rms_) = rest(c), rest(d)
        moments = apart_by(mean, mean_) + apart_by(spread, spread_)
        value = apart_by(np.diag(c), np.diag(d))
        lower_bounds.append((value + (n - 1) * max(moments, apart_by(rms, rms_))) / n**2)
    if bounds == "cheap":
        return max(lower_bounds)
    if weighted or n > 64 or (matching and bounds == "third"):
        return None
    x, y = np.sort(c, 1), np.sort(d, 1)
    costs = (np.abs(x[:, None] - y[None]) ** p).mean(-1)
    lower_bounds.append(costs[scipy.optimize.linear_sum_assignment(costs)].mean())
    return max(lower_bounds)


def _share_lost(case: dict[str, Any]) -> float:
    """Share that rounding takes of the distance from the exact lower bound to the upper one."""
    return max(case["exact"] - case["lower"], 0.0) / case["gap"]


def report(cases: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    """A row a kind, and the promises."""
    rows = []
    for kind in dict.fromkeys(case["kind"] for case in cases):
        some = [case for case in cases if case["kind"] == kind]
        certified = [case for case in some if "lower" in case and not case.get("nan")]
        wrong = [c for c in certified if c["excess of lower"] > 0 or c["lack of upper"] > 0]
        # In the units of the cost, and of the cost where that is larger: float32 rounds the answer.
        wide = [
            c for c in certified if "gap" in c and c["gap"] > 1e-3 * max(1, c["exact"] + c["gap"])
        ]
        # Of graphs that differ by less, a factor's products in float64 have few digits left.
        wide = [c for c in wide if c["noise"] >= 1e-7]
        worst = max(wide, key=_share_lost, default=None)
        rows.append(
            {
                "area": "transport",
                "kind": kind,
                "cases": len(some),
                "refused": sum("refused" in case for case in some),
                "violations": len(wrong),
                "NaN": sum(bool(case.get("nan")) for case in some),
                "not the bound": sum(case.get("above exact", 0.0) > 1e-9 for case in certified),
                "gap > 1e-3": len(wide),
                "most lost": _share_lost(worst) if worst else None,
                "worst at": f"n = {worst['n']}, noise {worst['noise']:.0e}" if worst else None,
            }
        )
    most = max((row["most lost"] or 0.0 for row in rows if "jit" not in row["kind"]), default=0.0)
    return rows, [
        suite.at_most(
            f"transport, {len(cases):,} cases: violations",
            sum(row["violations"] for row in rows),
            0,
        ),
        suite.at_most(
            "transport: cost of a plan / that of its repair",
            max((case.get("cost over repaired", 1.0) for case in cases), default=1.0),
            1.01,
        ),
        suite.at_most("transport: NaN", sum(row["NaN"] for row in rows), 0),
        suite.at_most("transport: share of a gap that rounding costs", most, 0.01),
    ]
