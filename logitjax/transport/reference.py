"""General Gromov-Wasserstein solvers of ott-jax, to hold the closed forms against.

ott takes seconds to import and is loaded on the first call. Its solvers return a number whether
or not they converged, and an unconverged plan breaks its marginals, so that its cost may lie below
the true optimum. Here such a `Solution` has no ``value``.
"""

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.transport._graph import (
    FactoredGraph,
    Graph,
    dense_factor,
    dense_matrix,
    moments,
    multiply,
    num_nodes,
)
from logitjax.transport._rounding import Weights

__all__ = ("Solution", "entropic_gw", "low_rank_gw")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution:
    """What a solver found, and whether it is to be trusted.

    Attributes:
        cost: the cost GW_2^2 of ``plan``, entropy not counted, in the units of the input. It bounds
            nothing where the solve did not finish: read ``value``.
        plan: the coupling ``[n, m]``.
        epsilon: entropic regularisation reached, relative to the mean squared cost.
        marginal_error: largest L1 distance of a marginal of the plan from the weights.
        iterations: outer iterations in all.
        reason: what failed; empty where nothing did.
    """

    cost: float
    plan: jax.Array
    epsilon: float
    marginal_error: float
    iterations: int
    reason: str = ""

    @property
    def converged(self) -> bool:
        return not self.reason

    @property
    def value(self) -> float:
        """The cost of a solve that finished; of another, a ValueError with the reason."""
        if self.reason:
            raise ValueError(f"value: expected a solve that finished, got: {self.reason}")
        return self.cost


def entropic_gw(
    c: Graph,
    d: Graph,
    *,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
    epsilons: Sequence[float] = (1.0, 0.3, 0.1, 0.03, 0.01),
    start: Float[Array, "n m"] | None = None,
    marginal_tolerance: float = 1e-3,
    max_iterations: int = 100,
) -> Solution:
    """Entropic Gromov-Wasserstein (squared loss), with epsilon annealed and the result checked.

    Both graphs are divided by the RMS entry of the second one before ott sees them, and each
    epsilon starts from the plan of the one before. Not for use under ``jit``.

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph` (then ott keeps the factors).
        d: matrix ``[m, m]`` or `FactoredGraph`.
        c_weights: node weights that sum to one; uniform if left out.
        d_weights: the same for d.
        epsilons: regularisations, falling.
        start: a coupling for the first epsilon; the product of the weights if left out.
        marginal_tolerance: L1 error of the marginals above which a plan is refused.
        max_iterations: outer iterations at each epsilon.

    Returns:
        `Solution`. The value is an upper bound up to the marginal error; its
        entropic bias does not vanish: two equal graphs cost about 0.005 at epsilon 0.01.

    Raises:
        ValueError: if epsilons are not positive and falling.

    >>> import numpy as np
    >>> z = np.random.default_rng(0).normal(size=(8, 4))
    >>> answer = entropic_gw(z.T @ z, 2 * z.T @ z, epsilons=(0.3,))
    >>> answer.converged, answer.plan.shape
    (True, (4, 4))

    References:
        Peyre, Cuturi, Solomon (2016); ott-jax ``GromovWasserstein``.
    """
    if not epsilons or any(e <= 0 for e in epsilons) or sorted(epsilons)[::-1] != [*epsilons]:
        raise ValueError(f"epsilons: expected positive, falling numbers, got {tuple(epsilons)}")
    graphs, unit, a, b = _normalized(c, d, c_weights, d_weights)
    plan = jnp.outer(a, b) if start is None else jnp.asarray(start, jnp.float32)
    solve = _entropic_solver(max_iterations)
    iterations = 0
    output: Any = None
    epsilon = epsilons[0]
    for epsilon in epsilons:
        # Graphs divided by sqrt(epsilon) at epsilon one are the same problem, compiled once.
        output = solve(*(multiply(g, epsilon**-0.5) for g in graphs), a, b, plan)
        plan = output.plan
        iterations += int(output.iterations)
        if not bool(jnp.isfinite(plan).all()):
            break
    return _judge(output, unit * epsilon, a, b, epsilon, iterations, marginal_tolerance)


def low_rank_gw(
    c: Graph,
    d: Graph,
    *,
    rank: int = 10,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
    marginal_tolerance: float = 1e-3,
    max_iterations: int = 2000,
) -> Solution:
    """Low-rank Gromov-Wasserstein of ott-jax: plans of small rank, linear in the nodes.

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph`.
        d: matrix ``[m, m]`` or `FactoredGraph`.
        rank: rank of the plan.
        c_weights: node weights that sum to one; uniform if left out.
        d_weights: the same for d.
        marginal_tolerance: L1 error of the marginals above which a plan is refused.
        max_iterations: largest number of iterations of the mirror descent.

    >>> import jax, jax.numpy as jnp
    >>> z = jax.random.normal(jax.random.key(0), (8, 4))
    >>> low_rank_gw(z.T @ z, 2 * z.T @ z, rank=2).plan.shape
    (4, 4)

    References:
        Scetbon, Peyre, Cuturi (2022); ott-jax ``LRGromovWasserstein``.
    """
    (c, d), unit, a, b = _normalized(c, d, c_weights, d_weights)
    output = _low_rank_solver(rank, max_iterations)(c, d, a, b)
    return _judge(output, unit, a, b, 0.0, int(output.iterations), marginal_tolerance)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Output:
    plan: Any
    cost: Any
    converged: Any
    iterations: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Plan:
    """As much of ott's transport interface as a linearisation asks for."""

    matrix: Any

    def marginal(self, axis: int) -> jax.Array:
        return self.matrix.sum(axis)


@functools.cache
def _entropic_solver(max_iterations: int) -> Callable[..., "_Output"]:
    """ott's solver at epsilon one, its first linearisation taken at a given plan."""
    quadratic_problem = _ott("problems.quadratic.quadratic_problem")
    sinkhorn = _ott("solvers.linear.sinkhorn")
    gromov_wasserstein = _ott("solvers.quadratic.gromov_wasserstein")

    @jax.jit
    def solve(c: Any, d: Any, a: jax.Array, b: jax.Array, plan: jax.Array) -> _Output:
        problem = quadratic_problem.QuadraticProblem(_geometry(c), _geometry(d), a=a, b=b)
        solver = gromov_wasserstein.GromovWasserstein(
            sinkhorn.Sinkhorn(max_iterations=5000, threshold=1e-4),
            epsilon=1.0,
            warm_start=True,
            threshold=1e-4,
            max_iterations=max_iterations,
        )
        output = solver(problem, init=problem.update_linearization(_Plan(plan), 1.0))
        steps = jnp.sum(output.costs != -1)
        return _Output(output.matrix, output.primal_cost, output.converged, steps)

    return solve


@functools.cache
def _low_rank_solver(rank: int, max_iterations: int) -> Callable[..., "_Output"]:
    quadratic_problem = _ott("problems.quadratic.quadratic_problem")
    gromov_wasserstein_lr = _ott("solvers.quadratic.gromov_wasserstein_lr")

    @jax.jit
    def solve(c: Any, d: Any, a: jax.Array, b: jax.Array) -> _Output:
        problem = quadratic_problem.QuadraticProblem(_geometry(c), _geometry(d), a=a, b=b)
        solver = gromov_wasserstein_lr.LRGromovWasserstein(
            rank=rank,
            min_iterations=0,
            max_iterations=max_iterations,
            inner_iterations=min(10, max_iterations),
        )
        output = solver(problem)
        steps = jnp.sum(output.errors != -1) * output.inner_iterations
        return _Output(output.matrix, output.primal_cost, output.converged, steps)

    return solve


def _ott(module: str) -> Any:
    with warnings.catch_warnings():
        # ott imports jaxopt, which announces on import that it is no longer maintained.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"ott.{module}")


def _geometry(graph: Graph) -> Any:
    if isinstance(graph, FactoredGraph):
        z = dense_factor(graph).T
        return _ott("geometry.low_rank").LRCGeometry(cost_1=z, cost_2=z)
    return _ott("geometry.geometry").Geometry(cost_matrix=dense_matrix(graph))


def _normalized(
    c: Graph, d: Graph, c_weights: Weights, d_weights: Weights
) -> tuple[list[Any], float, jax.Array, jax.Array]:
    """Both graphs divided by the RMS entry of d, the unit of their cost, and the weights."""
    a, b = (
        jnp.full(num_nodes(g), 1.0 / num_nodes(g)) if w is None else jnp.asarray(w, jnp.float32)
        for g, w in ((c, c_weights), (d, d_weights))
    )
    square = float(moments(d, b)[1] @ b) or 1.0
    return [multiply(g, square**-0.5) for g in (c, d)], square, a, b


def _judge(
    output: Any,
    unit: float,
    a: jax.Array,
    b: jax.Array,
    epsilon: float,
    iterations: int,
    tolerance: float,
) -> Solution:
    rows, columns = output.plan.sum(1), output.plan.sum(0)
    error = float(jnp.maximum(jnp.abs(rows - a).sum(), jnp.abs(columns - b).sum()))
    reason = ""
    if not error <= tolerance:  # also where it is nan
        reason = f"marginals are off by {error:.2e}, more than {tolerance:g}"
    elif not bool(output.converged):
        reason = f"not converged after {iterations} iterations, at epsilon {epsilon:g}"
    return Solution(
        cost=float(output.cost) * unit,
        plan=output.plan,
        epsilon=epsilon,
        marginal_error=error,
        iterations=iterations,
        reason=reason,
    )
