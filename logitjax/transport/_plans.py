"""Plans of other solvers, and their costs once they are repaired to couplings."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from logitjax.transport import _graph as graphs
from logitjax.transport._graph import FactoredGraph, Graph, ProductGraph, RoundedMatrix, applied
from logitjax.transport._linear import Linear, linear_at_plan
from logitjax.transport._rounding import Scalar, Weights, gamma, real
from logitjax.transport._sorted import Coupling

# L1 error of the marginals above which a plan belongs to another problem.
_FAR = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Masses ``[n, m]``: a matrix, or A B^T by its factors ``[n, k]`` and ``[m, k]``."""

    left: Any
    right: Any = None

    def matching(self) -> Coupling:
        """The matching of each row's heaviest entry, if it is one."""
        n = len(self.left)
        columns = jnp.argmax(self.left, axis=1).astype(jnp.int32)
        return Coupling(jnp.arange(n, dtype=jnp.int32), columns, jnp.full(n, 1.0 / n))

    def marginals(self) -> tuple[Any, Any]:
        if self.right is None:
            return self.left.sum(1), self.left.sum(0)
        return self.left @ self.right.sum(0), self.right @ self.left.sum(0)

    def scaled(self, rows: jax.Array, columns: jax.Array) -> "Plan":
        left = self.left * rows[:, None]
        if self.right is None:
            return Plan(left * columns)
        return Plan(left, self.right * columns[:, None])


def as_candidate(candidate: Any, n: int, m: int, p: int, weights: tuple[Weights, Weights]) -> Any:
    """Return a coupling unchanged, and anything with masses, or their factors, as a `Plan`."""
    if isinstance(candidate, Coupling):
        return candidate
    # ott's solver of dense problems stores the solution of its last linear one.
    factors = [getattr(getattr(candidate, "linear_state", candidate), name, None) for name in "qrg"]
    if all(x is not None for x in factors):
        q, r, g = (x if isinstance(x, Tracer) else np.asarray(x, np.float64) for x in factors)
        plan = Plan(q / g, r)
    else:
        for name in ("plan", "matrix"):
            candidate = getattr(candidate, name, candidate)
        plan = Plan(candidate if isinstance(candidate, jax.Array) else np.asarray(candidate))
    shape = len(plan.left), plan.left.shape[-1] if plan.right is None else len(plan.right)
    if plan.left.ndim != 2 or shape != (n, m):
        raise ValueError(
            f"candidates: expected couplings or plans of shape ({n}, {m}), got {plan.left.shape}"
        )
    if p != 2:
        raise ValueError(f"candidates: plans need p=2, got p={p}; a Coupling may have any p")
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves((plan, weights))):
        existing = jax.tree.map(lambda x: np.maximum(np.asarray(x, np.float64), 0.0), plan)
        sides = zip(existing.marginals(), weights, strict=True)
        error = sum(np.abs(x - (1 / len(x) if w is None else w)).sum() for x, w in sides)
        # Also true if it is nan.
        if not error <= _FAR:
            raise ValueError(
                "candidates: expected a plan whose marginals are the weights of the nodes, got "
                f"one whose marginals are off by {error:.3g} in L1, more than {_FAR:g}"
            )
    return plan


def repaired(plan: Plan, a: jax.Array, b: jax.Array) -> tuple[Plan, Scalar]:
    """A plan with marginals a and b near the given one, and a bound of the distance between them.

    Rows, then columns are scaled down to their weights; what is missing is added as a product
    (Altschuler, Weed and Rigollet, 2017, algorithm 2, and lemma 7 for the distance).
    """
    plan = jax.tree.map(lambda x: jnp.maximum(real(x), 0.0), plan)
    rows, _ = plan.marginals()
    plan = plan.scaled(_share(a, rows), jnp.ones_like(b))
    _, columns = plan.marginals()
    plan = plan.scaled(jnp.ones_like(a), _share(b, columns))
    rows, columns = (jnp.maximum(w - x, 0.0) for w, x in zip((a, b), plan.marginals(), strict=True))
    total = jnp.maximum(rows.sum(), columns.sum())
    rows = rows / jnp.where(total > 0, total, 1.0)
    if plan.right is None:
        plan = Plan(plan.left + jnp.outer(rows, columns))
    else:
        plan = Plan(*(jnp.column_stack(x) for x in ((plan.left, rows), (plan.right, columns))))
    off: Any = sum(jnp.abs(x - w).sum() for x, w in zip(plan.marginals(), (a, b), strict=True))
    return plan, 2 * off + 8 * gamma(sum(map(len, (a, b))) + plan.left.shape[1])


def _share(most: jax.Array, mass: jax.Array) -> jax.Array:
    return jnp.where(mass > most, most / jnp.where(mass > most, mass, 1.0), 1.0)


def plan_cost(
    c: Graph,
    d: Graph,
    plan: Plan,
    *,
    c_weights: Weights,
    d_weights: Weights,
    linear: Linear = None,
    error: Any = 0.0,
) -> Scalar:
    """Bound a plan's cost once it is `repaired`, for p = 2; O(n m (n + m)) or O(n k^2).

    `sum_ij C_ij^2 a_i a_j + sum_kl D_kl^2 b_k b_l - 2 <C P D^T, P>`
    """
    weights = graphs.node_weights(c, c_weights), graphs.node_weights(d, d_weights)
    far = sum(jnp.abs(x - w).sum() for x, w in zip(plan.marginals(), weights, strict=True))
    plan, distance = repaired(plan, *weights)
    sides = [
        jnp.sum(w * graphs.row_statistics(g, marginal).square)
        for g, w, marginal in zip((c, d), weights, (c_weights, d_weights), strict=True)
    ]
    if plan.right is None:
        both = jnp.sum(jnp.sum(applied(d, applied(c, plan.left).T).T * plan.left, axis=1))
    else:
        left, right = plan.left, plan.right
        both = jnp.sum((left.T @ applied(c, left)) * (right.T @ applied(d, right)))
    # Each of the three sums is at most this, also with absolute values of factors for C.
    sizes = [_size(g, w, local) for g, w, local in zip((c, d), weights, sides, strict=True)]
    count = 3 * sum(map(len, weights)) + 4 * plan.left.shape[1]
    count += 2 * sum(graphs.rank(g) for g in (c, d) if isinstance(g, FactoredGraph | ProductGraph))
    most = jnp.maximum(sum(sides) - 2 * both, 0.0) + 2 * gamma(count) * jnp.square(sum(sizes))
    formed = error + sum(g.error for g in (c, d) if isinstance(g, RoundedMatrix))
    most = jnp.square(jnp.sqrt(most) + formed)
    # The two sums of squares depend only on the weights: the product moves with the plan.
    most += 4 * distance * (1 + distance) * graphs.largest(c) * graphs.largest(d)
    most += linear_at_plan(linear, plan.left, plan.right, distance)
    return jnp.where(far <= 2 * _FAR, most + gamma(8) * jnp.abs(most), jnp.nan)


def _size(graph: Graph, weights: jax.Array, square: jax.Array) -> jax.Array:
    if isinstance(graph, FactoredGraph | ProductGraph):
        norms = [weights @ x for x in graphs.factor_norms(graph)]
        return jnp.sqrt(norms[0]) * jnp.sqrt(norms[1])
    return jnp.sqrt(square)
