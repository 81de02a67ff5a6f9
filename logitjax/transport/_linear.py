"""The linear term of a fused problem: ``sum_ik M_ik pi_ik`` of costs M ``[n, m]`` or L^T R."""

from typing import Any

import jax
import jax.numpy as jnp

from logitjax.transport._bounds import dual_value, least_assignment
from logitjax.transport._graph import ProductGraph, largest, rank
from logitjax.transport._rounding import Scalar, gamma, real

# A matrix of costs, by factors if it is large; None if there is no such term.
Linear = Any

_ROWS = 256  # at once


def linear_at_coupling(linear: Linear, coupling: Any, surplus: Any) -> tuple[Any, Any]:
    """The term at a coupling, and an upper bound at a true coupling within `surplus` of it."""
    if linear is None:
        return 0.0, 0.0
    rows, columns, mass = coupling.rows, coupling.columns, coupling.mass
    if isinstance(linear, ProductGraph):
        left, right = real(linear.left)[:, rows], real(linear.right)[:, columns]
        costs, sizes = jnp.sum(left * right, 0), jnp.sum(jnp.abs(left * right), 0)
        count = len(mass) + rank(linear)
    else:
        costs = real(linear)[rows, columns]
        sizes, count = jnp.abs(costs), len(mass)
    value = jnp.sum(mass * costs)
    return value, value + gamma(count) * jnp.sum(mass * sizes) + surplus * largest(linear)


def linear_at_plan(linear: Linear, left: jax.Array, right: jax.Array | None, distance: Any) -> Any:
    """An upper bound of the term of a coupling within `distance` of a plan, or of left right^T."""
    if linear is None:
        return 0.0
    count = sum(left.shape) + (0 if right is None else len(right))
    if isinstance(linear, ProductGraph):
        other = real(linear.right) if right is None else real(linear.right) @ right
        value = jnp.sum((real(linear.left) @ left) * other)
        count += rank(linear)
    else:
        costs = real(linear)
        terms = costs * left if right is None else (left.T @ costs) * right.T
        value = jnp.sum(jnp.sum(terms, axis=1))
    return value + (2 * gamma(count) + distance) * largest(linear)


def linear_lower_bound(
    linear: Linear, a: jax.Array, b: jax.Array, *, uniform: bool, exact: bool
) -> Scalar:
    """A lower bound of the term: an assignment, a dual solution or nearest nodes."""
    most = largest(linear)
    if isinstance(linear, ProductGraph):
        sides = (linear.left, linear.right, a), (linear.right, linear.left, b)
        least = jnp.maximum(*(_nearest(*side) for side in sides))
        return least - 2 * gamma(rank(linear) + max(len(a), len(b))) * most
    costs = real(linear)
    # Every coupling pays it.
    floor = costs.min()
    costs = jax.lax.stop_gradient(costs - floor)
    if uniform and exact:
        value, absolute = least_assignment(costs)[0] / len(a), 0.0
    else:
        value, absolute = dual_value(costs, a, b)
    return floor + value - absolute - gamma(8) * most


def _nearest(left: Any, right: Any, weights: jax.Array) -> Scalar:
    """The mean over one side of the least cost to any node of the other; no n x m numbers."""
    right = real(right)
    least = jax.lax.map(lambda x: jnp.min(x @ right), real(left).T, batch_size=_ROWS)
    return weights @ least
