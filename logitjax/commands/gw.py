"""Bound the Gromov-Wasserstein distance of two graphs, with proofs, next to a general solver.

    logitjax gw A.npy B.npy
    logitjax gw A.npy B.npy --solver=ott --bounds=third

A and B are square matrices, or with `--factors` the factors Z `[positions, nodes]` of graphs Z^T Z,
in numpy's .npy format. Nodes have equal weights. The values are Gromov-Wasserstein costs with p =
2, in units of the mean squared entry of B. `gap` is the value divided by the lower bound: no
solution can be better by more than that factor. A solver's value is the cost of its plan once its
marginals are repaired. `--solver=pot` needs `pip install 'logitjax[benchmark]'`.
"""

import dataclasses
import functools
import time
import types
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from logitjax import storage, transport
from logitjax.commands.cli import REQUIRED, field
from logitjax.commands.tables import markdown_table
from logitjax.storage.weights import read_npy

# Annealed: a solve at the last value alone starts far from its plan.
_EPSILONS = (1.0, 0.3, 0.1, 0.03, 0.01)
# L1 error of a marginal above which a plan's cost may be below the true optimum.
_MARGINALS = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The two graphs, the bounds and the solver."""

    graphs: tuple[str, ...] = field(REQUIRED, "The two graphs, as .npy files.", positional=True)
    factors: bool = field(False, "Read the files as factors Z rather than matrices.")
    bounds: Literal["cheap", "third"] = field(
        "cheap", "Work for the lower bound: n^2 (cheap) or n^3 (third)."
    )
    refine: Literal["none", "exchange", "search"] = field(
        "exchange", "How to improve the coupling, if both graphs have the same number of nodes."
    )
    solver: Literal["none", "ott", "pot"] = field("none", "General solver to compare with.")


def run(config: Config) -> None:
    """Print a table: closed form, certificate and, if requested, the solver's value."""
    if len(config.graphs) != 2:
        raise ValueError(f"graphs: expected two files, got {len(config.graphs)}")
    if config.solver == "pot":
        # Refused before the certificate is computed.
        storage.require("ot", extra="benchmark")
    matrices = [_read(path, config.factors) for path in config.graphs]
    c, d = (transport.FactoredGraph(x) if config.factors else x for x in matrices)
    sizes = [x.shape[-1] for x in matrices]
    refine = None
    if config.refine != "none" and sizes[0] == sizes[1]:
        refine = transport.Refinement(config.refine)
    start = time.perf_counter()
    answer = transport.certificate(c, d, bounds=config.bounds, refine=refine)
    seconds = time.perf_counter() - start
    unit = float(answer.units[1]) ** 2
    start = time.perf_counter()
    closed_form = float(transport.first_lower_bound(c, d, p=2)) / unit
    rows: list[dict[str, Any]] = [
        {"method": "closed form", "lower": closed_form, "seconds": time.perf_counter() - start},
        {"method": "certificate", "lower": float(answer.lower), "value": float(answer.upper)}
        | {"gap": float(answer.gap), "seconds": seconds},
    ]
    if config.solver != "none":
        wide = [x.astype(np.float64) for x in matrices]
        first, second = (x.T @ x if config.factors else x for x in wide)
        row, plan = _solve(config.solver, first, second)
        if plan is not None:
            judged = transport.certificate(first, second, candidates=[plan])
            value = float(judged.costs[0])
            lower = float(answer.lower)
            row |= {"value": value, "gap": value / lower if lower > 0 else float("inf")}
        rows.append(row)
    print(f"{sizes[0]} and {sizes[1]} nodes\n\n{markdown_table(rows)}")


def _read(path: str, factors: bool) -> np.ndarray:
    array = read_npy(path)
    if array.ndim != 2 or not (factors or array.shape[0] == array.shape[1]):
        expected = "a factor [positions, nodes]" if factors else "a square matrix"
        raise ValueError(f"graphs: expected {expected} in {path}, got shape {array.shape}")
    return array.astype(np.float32)


def _solve(solver: str, c: np.ndarray, d: np.ndarray) -> tuple[dict[str, Any], Any]:
    start = time.perf_counter()
    if solver == "ott":
        plan, _, reason = entropic_gw(c, d)
        row: dict[str, Any] = {"method": "ott, entropic", "seconds": time.perf_counter() - start}
        return (row | {"note": reason}, None) if reason else (row, plan)
    ot = storage.require("ot", extra="benchmark")
    a, b = (np.full(len(x), 1 / len(x)) for x in (c, d))
    # POT's tolerances are absolute: entries far from 1 would stop it early or never.
    unit = np.sqrt(np.square(d).mean()) or 1.0
    plan = ot.gromov.gromov_wasserstein(c / unit, d / unit, a, b, loss_fun="square_loss")
    return {"method": "POT", "seconds": time.perf_counter() - start}, plan


def entropic_gw(
    c: np.ndarray, d: np.ndarray, *, max_iterations: int = 100
) -> tuple[jax.Array, float, str]:
    """ott's entropic plan, its cost without the entropy, and the reason if it is no solution.

    Epsilon falls to 0.01 of the mean squared entry of d, and each solve starts from the previous
    plan. ott returns a number whether or not it converged.
    """
    unit = float(np.sqrt(np.square(d).mean())) or 1.0
    x, y = (jnp.asarray(matrix / unit, jnp.float32) for matrix in (c, d))
    a, b = (jnp.full(len(matrix), 1 / len(matrix)) for matrix in (x, y))
    plan, cost, converged, solve = jnp.outer(a, b), 0.0, False, _entropic_solver(max_iterations)
    for epsilon in _EPSILONS:
        # Matrices divided by sqrt(epsilon) at epsilon 1 are the same problem, compiled once.
        plan, scaled, converged = solve(x * epsilon**-0.5, y * epsilon**-0.5, a, b, plan)
        cost = float(scaled) * epsilon * unit**2
        if not bool(jnp.isfinite(plan).all()):
            break
    sides = (jnp.abs(plan.sum(1) - a).sum(), jnp.abs(plan.sum(0) - b).sum())
    error = max(map(float, sides))
    # Also true if it is nan.
    if not error <= _MARGINALS:
        return plan, cost, f"marginals are off by {error:.2e}, more than {_MARGINALS:g}"
    return plan, cost, "" if converged else f"not converged in {max_iterations} iterations"


@functools.cache
def _entropic_solver(max_iterations: int) -> Callable[..., Any]:
    """ott's solver at epsilon 1, with its first linearisation at a given plan."""
    with warnings.catch_warnings():
        # ott imports jaxopt, which announces on import that it is no longer maintained.
        warnings.simplefilter("ignore", DeprecationWarning)
        from ott.geometry.geometry import Geometry
        from ott.problems.quadratic.quadratic_problem import QuadraticProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn
        from ott.solvers.quadratic.gromov_wasserstein import GromovWasserstein

    @jax.jit
    def solve(c: Any, d: Any, a: Any, b: Any, plan: Any) -> Any:
        problem = QuadraticProblem(Geometry(cost_matrix=c), Geometry(cost_matrix=d), a=a, b=b)
        solver = GromovWasserstein(
            Sinkhorn(max_iterations=5000, threshold=1e-4),
            epsilon=1.0,
            warm_start=True,
            threshold=1e-4,
            max_iterations=max_iterations,
        )
        # The part of ott's transport interface that a linearisation needs.
        start: Any = types.SimpleNamespace(matrix=plan, marginal=plan.sum)
        output = solver(problem, init=problem.update_linearization(start, 1.0))
        return output.matrix, output.primal_cost, output.converged

    return solve
