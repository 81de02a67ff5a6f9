"""Problems of ott as graphs, recognised by their attributes, so that ott is not imported."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from logitjax.transport._graph import FactoredGraph, Graph, ProductGraph
from logitjax.transport._linear import Linear

# Up to this many entries the costs of a linear term are multiplied out: tighter bounds.
_DENSE_COSTS = 1 << 22


class Problem(NamedTuple):
    """Two graphs, weights of their nodes if not uniform, and the costs of nodes."""

    c: Graph
    d: Graph
    c_weights: np.ndarray | None
    d_weights: np.ndarray | None
    linear: Linear


def is_problem(value: Any) -> bool:
    return hasattr(value, "geom_xx") or hasattr(value, "ot_prob") or hasattr(value, "linear_state")


def from_problem(source: Any) -> Problem:
    """A ``QuadraticProblem`` of ott, or that of a low-rank solution, in float64."""
    problem = getattr(source, "ot_prob", source)
    if not hasattr(problem, "geom_xx"):
        raise TypeError(
            "c: expected graphs, a QuadraticProblem of ott, or a solution that keeps its problem; "
            f"got {type(source).__name__}: pass the problem, then the solution"
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(problem)):
        raise TypeError("c: expected a concrete problem, got one under a transform")
    if (problem.tau_a, problem.tau_b) != (1.0, 1.0):
        raise ValueError(
            "c: expected a balanced problem, got an unbalanced one with "
            f"tau_a={problem.tau_a:g}, tau_b={problem.tau_b:g}"
        )
    if [problem.loss.f1.func(3.0), problem.loss.h2.func(3.0)] != [9.0, 6.0]:
        raise ValueError("c: expected a problem with loss='sqeucl', got another loss")
    graphs = [_matrix(g, square=True) for g in (problem.geom_xx, problem.geom_yy)]
    weights = [np.asarray(w, np.float64) for w in (problem.a, problem.b)]
    uniform = [np.allclose(w, 1 / len(w), rtol=1e-6, atol=0) for w in weights]
    linear: Any = None
    if problem.geom_xy is not None:
        linear = _matrix(problem.geom_xy, square=False)
        penalty = float(problem.fused_penalty)
        if not isinstance(linear, ProductGraph):
            linear = linear * penalty
        elif linear.left.shape[1] * linear.right.shape[1] <= _DENSE_COSTS:
            linear = linear.left.T @ linear.right * penalty
        else:
            linear = ProductGraph(linear.left * penalty, linear.right)
    a, b = (None if u else w for u, w in zip(uniform, weights, strict=True))
    return Problem(graphs[0], graphs[1], a, b, linear)


def _matrix(geometry: Any, *, square: bool) -> Any:
    # Factors are off by a few roundings of float64, which every bound of products allows for.
    if hasattr(geometry, "cost_1"):
        left, right = (np.asarray(x, np.float64) for x in (geometry.cost_1, geometry.cost_2))
        bias = float(geometry.bias)
        if square and bias == 0 and np.array_equal(left, right):
            # For Gram matrices a matching is known to be optimal.
            return FactoredGraph(left.T)
        if bias:
            left = np.column_stack([left, np.full(len(left), bias)])
            right = np.column_stack([right, np.ones(len(right))])
        return _balanced(left.T, right.T)
    squared, inner = (
        getattr(geometry, name, False) for name in ("is_squared_euclidean", "is_neg_dotp")
    )
    if not (squared or inner):
        return np.asarray(geometry.cost_matrix, np.float64)
    x, y = (np.asarray(points, np.float64) for points in (geometry.x, geometry.y))
    unit = float(geometry.inv_scale_cost)
    if inner:
        return _balanced(-unit * x.T, y.T)
    # Distances do not depend on the origin, and lose fewer digits about the centre.
    middle = x.mean(0).astype(np.float32)
    x, y = x - middle, y - middle
    # The squares in higher precision than float64 if the machine has it.
    norms = [np.square(z.astype(np.longdouble)).sum(1).astype(np.float64) for z in (x, y)]
    left = np.vstack([unit * norms[0], np.full(len(x), unit), -2 * unit * x.T])
    return _balanced(left, np.vstack([np.ones(len(y)), norms[1], y.T]))


def _balanced(left: np.ndarray, right: np.ndarray) -> ProductGraph:
    """Scale both factors of each term to about equal size, by powers of two."""
    exponents = [np.frexp(np.abs(x).max(1, keepdims=True, initial=0.0))[1] for x in (left, right)]
    shift = (exponents[0] - exponents[1]) // 2
    return ProductGraph(np.ldexp(left, -shift), np.ldexp(right, shift))
