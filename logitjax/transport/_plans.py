"""Problems and solutions of other libraries: ott's `QuadraticProblem`, plans of ott and POT."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.ops import Array
from logitjax.transport._graph import Graph, node_weights, rounded
from logitjax.transport._rounding import Scalar, Weights, gamma, real
from logitjax.transport._sorted import Coupling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """A coupling as a matrix ``[n, m]``."""

    plan: Array

    def matching(self) -> Coupling:
        """The matching that takes each row's heaviest entry, if it is one."""
        n = len(self.plan)
        columns = jnp.argmax(self.plan, axis=1).astype(jnp.int32)
        return Coupling(jnp.arange(n, dtype=jnp.int32), columns, jnp.full(n, 1.0 / n))


def as_candidate(given: Any, n: int, m: int, p: int) -> Coupling | Plan:
    """A coupling as it is, and anything that has or is a matrix of masses as a `Plan`."""
    if isinstance(given, Coupling):
        return given
    for name in ("plan", "matrix"):
        given = getattr(given, name, given)
    # Arrays of numpy keep their float64 until there is a type for it.
    plan = given if isinstance(given, jax.Array) else np.asarray(given)
    if plan.shape != (n, m):
        raise ValueError(
            f"candidates: expected couplings or plans of shape ({n}, {m}), got {plan.shape}"
        )
    if p != 2:
        raise ValueError(f"candidates: plans need p=2, got p={p}; a Coupling may have any p")
    return Plan(plan)


def plan_cost(c: Graph, d: Graph, plan: Array, *, c_weights: Weights, d_weights: Weights) -> Scalar:
    """What a plan costs at most once its marginals are repaired, for p = 2; O(n m (n + m)).

    ::

        sum_ij C_ij^2 r_i r_j + sum_kl D_kl^2 s_k s_l - 2 <C P D, P>,   r = P 1, s = P^T 1
    """
    c, d, plan = rounded(c, c_weights), rounded(d, d_weights), real(plan)
    x, y = c.matrix, d.matrix
    plan = jnp.maximum(plan, 0.0)
    taken, given = plan.sum(1), plan.sum(0)
    own = taken @ (jnp.square(x) @ taken)
    other = given @ (jnp.square(y) @ given)
    both = jnp.sum(jnp.sum((x @ plan @ y.T) * plan, axis=1))
    scale = jnp.square(jnp.sqrt(own) + jnp.sqrt(other))
    most = jnp.maximum(own + other - 2 * both, 0.0) + 2 * gamma(3 * sum(plan.shape)) * scale
    # The error of a matrix that was formed is known under the weights of the nodes.
    heavier = jnp.maximum(
        jnp.max(taken / node_weights(c, c_weights), initial=1.0),
        jnp.max(given / node_weights(d, d_weights), initial=1.0),
    )
    most = jnp.square(jnp.sqrt(most) + heavier * (c.error + d.error))
    surplus = (
        jnp.maximum(1 - plan.sum(), 0.0)
        + jnp.maximum(taken - node_weights(c, c_weights), 0.0).sum()
        + jnp.maximum(given - node_weights(d, d_weights), 0.0).sum()
        + 4 * gamma(sum(plan.shape))
    )
    reach = jnp.square(2 * (jnp.abs(x).max() + jnp.abs(y).max()))
    return (most + 2 * surplus * reach) * (1 + gamma(8))


def from_problem(problem: Any) -> tuple[Any, ...]:
    """Graphs and weights of an ott `QuadraticProblem`; weights None where they are uniform."""
    if not hasattr(problem, "geom_xx"):
        raise ValueError("d: expected a second graph, or c to be a QuadraticProblem of ott")
    if problem.is_fused or not problem.is_balanced:
        raise ValueError("c: expected a balanced problem of structures alone, got another")
    if problem.loss.f1.func(3.0) != 9.0:
        raise ValueError("c: expected a problem with squared loss, got another loss")
    # Also of a low-rank geometry: its scale and bias are part of the matrix.
    graphs = [jnp.asarray(geometry.cost_matrix) for geometry in (problem.geom_xx, problem.geom_yy)]
    weights = [np.asarray(w) for w in (problem.a, problem.b)]
    uniform = [np.allclose(w, 1 / len(w), rtol=1e-6, atol=0) for w in weights]
    return *graphs, *(None if u else w for u, w in zip(uniform, weights, strict=True))
