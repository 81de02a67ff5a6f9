"""Lower bounds of the Gromov-Wasserstein cost, from O(T k) to O(n^3).

All bound ``GW_p^p(C, D) = min_pi sum |C_ij - D_kl|^p pi_ik pi_jl`` (no factor 1/2), any matrices::

    first <= moment <= third <= GW

All but the first two form the matrix of a `FactoredGraph`. Possible rounding is subtracted
(`logitjax.transport._rounding`), so that the last inequality always holds.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.transport import _graph as graphs
from logitjax.transport import _rounding as rounding
from logitjax.transport._graph import Graph, RoundedMatrix, num_nodes
from logitjax.transport._rounding import UNDERFLOW, Order, Scalar, Square, Vector, Weights
from logitjax.transport._sorted import least_transport

# Pairs of rows compared at once by the third bound.
_ROWS = 64


def first_lower_bound(
    c: Graph,
    d: Graph,
    *,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
    p: int = 1,
) -> Float[Array, ""]:
    """Memoli's first lower bound: transport of the row means. With p = 1 the closed form.

    `W_p^p(C a, D b) <= GW_p^p(C, D)`, also of nearly equal graphs: rounding is subtracted.

    Args:
        c, d: matrices ``[n, n]`` and ``[m, m]``, or `FactoredGraph`.
        c_weights, d_weights: node weights a, b that sum to one; by default uniform.
        p: power of the cost, 1 or 2.

    Raises:
        ValueError: for another p, or weights of another shape or, if their values are known, that
            do not sum to one.

    >>> import jax, numpy as np
    >>> print(f"{jax.jit(first_lower_bound)(np.diag([2.0, 0.0]), np.zeros((2, 2))):.4f}")
    0.5000

    References:
        Memoli (2011), definition 6.1; InfiGFusion (arXiv 2505.13893) prints it as the distance.
    """
    graphs.check_power(p)
    least = _least(c, d, c_weights, d_weights, p)("mean")
    return rounding.lowered(least, p=p, root=_formed(c) + _formed(d))


def moment_lower_bound(
    c: Graph,
    d: Graph,
    *,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
) -> Float[Array, ""]:
    """The best cheap bound for p = 2: row means, row deviations and row RMS, no n x n numbers.

    Each row of C is a distribution of numbers with mean mu and deviation s. Two of them are at
    least ``(mu - mu')^2 + (s - s')^2`` apart in W_2^2, and at least ``(r - r')^2`` with
    ``r^2 = mu^2 + s^2``; hence::

        max(W_2^2(mu_C, mu_D) + W_2^2(s_C, s_D),  W_2^2(r_C, r_D)) <= GW_2^2(C, D)

    Arguments are those of `first_lower_bound`; with p = 2 it is at least as large.

    References:
        The bound by moments is Gelbrich's (1990) on the line; its use here is ours.
    """
    least = _least(c, d, c_weights, d_weights, 2)
    apart = (least("mean") + least("deviation")) * (1 - rounding.gamma(0))
    # Graphs rounded when they were formed are nearer to the given ones than to each other.
    return rounding.lowered(jnp.maximum(apart, least("rms")), p=2, root=_formed(c) + _formed(d))


def _formed(graph: Graph) -> Any:
    return graph.error if isinstance(graph, RoundedMatrix) else 0.0


def _least(
    c: Graph, d: Graph, c_weights: Weights, d_weights: Weights, p: int
) -> Callable[[str], Scalar]:
    """The least cost of transporting one of the rows' statistics, by its name."""
    graphs.check_weights("c_weights", c_weights, num_nodes(c))
    graphs.check_weights("d_weights", d_weights, num_nodes(d))
    sides = (c, c_weights), (d, d_weights)
    statistics = [graphs.row_statistics(*side) for side in sides]
    weights = [graphs.node_weights(*side) for side in sides]

    def least(name: str) -> Scalar:
        f, g = (getattr(s, name) for s in statistics)
        errors = (getattr(s, f"{name}_error") for s in statistics)
        root = sum(rounding.distance(error, w, p) for error, w in zip(errors, weights, strict=True))
        root *= 1 + rounding.gamma(len(f) + len(g))
        return least_transport(f, g, c_weights, d_weights, p=p, root=root)

    return least


def third_lower_bound(
    c: Graph,
    d: Graph,
    *,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
    p: int = 2,
) -> Float[Array, ""]:
    """Memoli's third lower bound (2011, section 6): transport of the rows' distributions, O(n^3).

    `min_pi sum_ik W_p^p(C_i., D_k.) pi_ik <= GW_p^p(C, D)`

    Equal sizes without weights: exact, by the Hungarian algorithm; else its dual is ascended. The
    value of any dual solution is a lower bound. The gradient is that at the matching found.
    """
    c, d = graphs.rounded(c, c_weights), graphs.rounded(d, d_weights)
    a, b = graphs.node_weights(c, c_weights), graphs.node_weights(d, d_weights)
    x, y, root, n = c.matrix, d.matrix, c.error + d.error, len(a)
    if n == len(b) and c_weights is None and d_weights is None:
        x, y = jnp.sort(x, axis=1), jnp.sort(y, axis=1)
        costs = row_costs(jax.lax.stop_gradient(x), jax.lax.stop_gradient(y), p)
        least, columns = least_assignment(costs)
        raw = jnp.mean(jnp.mean(jnp.abs(x - y[columns]) ** p, axis=1))
        # The dual's value, with the gradient of the matching's cost.
        value = (raw - jax.lax.stop_gradient(raw)) + least / n
        return rounding.lowered(value, p=p, relative=rounding.gamma(2 * n), root=root)

    def cost(row: jax.Array, other: jax.Array) -> jax.Array:
        return least_transport(row, other, a, b, p=p)

    costs = jax.lax.map(lambda row: jax.vmap(lambda other: cost(row, other))(y), x)
    value, absolute = dual_value(costs, a, b)
    return rounding.lowered(value, p=p, absolute=absolute, root=root)


def least_assignment(costs: Square) -> tuple[Scalar, Order]:
    """A lower bound of any assignment of these costs ``[n, n]``, and an assignment near it.

    The Hungarian algorithm rounds, but any column prices, here those of its assignment by shortest
    paths, give a bound: ``sum_k v_k + sum_i min_k (c_ik - v_k)``.
    """
    n = len(costs)
    i, k = optax.assignment.hungarian_algorithm(costs)
    columns = jnp.zeros(n, jnp.int32).at[i].set(k.astype(jnp.int32))
    matched = costs[jnp.arange(n), columns]
    # Steps smaller than this are rounding that cycles.
    least_step = 4 * rounding.gamma(0) * jnp.abs(costs).max()

    def relax(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        v, _, step = state
        shorter = jnp.min((v[columns] - matched)[:, None] + costs, axis=0)
        return jnp.minimum(v, shorter), jnp.any(shorter < v - least_step), step + 1

    start = jnp.zeros(n, costs.dtype), jnp.ones((), bool), jnp.zeros((), jnp.int32)
    v, _, _ = jax.lax.while_loop(lambda state: state[1] & (state[2] < n), relax, start)
    # Feasible by construction, however far v is from the best prices.
    u = jnp.min(costs - v, axis=1)
    slack = rounding.gamma(n) * (jnp.abs(u).sum() + jnp.abs(v).sum())
    return jax.lax.stop_gradient(u.sum() + v.sum() - 2 * slack), columns


def row_costs(
    x: Float[jax.Array, "n k"], y: Float[jax.Array, "m k"], p: int
) -> Float[jax.Array, "n m"]:
    """Mean |x_i - y_k|^p of sorted rows, ``[n, m]``, a few rows at a time."""

    def one(row: jax.Array) -> jax.Array:
        return jnp.mean(jnp.abs(row - y) ** p, axis=-1)

    return jax.lax.map(one, x, batch_size=min(_ROWS, x.shape[0]))


def dual_value(
    costs: Float[jax.Array, "n m"], a: Vector, b: Float[jax.Array, "m"], steps: int = 200
) -> tuple[Scalar, Scalar]:
    """A feasible dual value of the transport problem, by annealed soft c-transforms."""
    fixed = jax.lax.stop_gradient(costs)
    mean = fixed.mean()
    scale = jnp.where(mean > UNDERFLOW, mean, 1.0)
    log_a, log_b = jnp.log(a)[:, None], jnp.log(b)

    def step(v: jax.Array, temperature: jax.Array) -> tuple[jax.Array, None]:
        u = -temperature * jax.nn.logsumexp((v - fixed) / temperature + log_b, axis=1)
        v = -temperature * jax.nn.logsumexp((u[:, None] - fixed) / temperature + log_a, axis=0)
        return v, None

    # Annealed towards the hard minimum. A poor end makes the bound loose, never wrong.
    temperatures = scale * jnp.geomspace(1.0, 1e-3, steps)
    v, _ = jax.lax.scan(step, jnp.zeros_like(b), temperatures)
    # At the best u the value depends on the costs through the second term alone.
    u = jax.lax.stop_gradient(jnp.min(fixed - v, axis=1))
    v = jnp.min(costs - u[:, None], axis=0)
    n = len(a) + len(b)
    slack = 2 * rounding.gamma(2 * n) * (a @ jnp.abs(u) + b @ jnp.abs(v))
    return a @ u + b @ v, jax.lax.stop_gradient(slack)


def check_equal_sizes(c: Graph, d: Graph, what: str) -> None:
    if num_nodes(c) != num_nodes(d):
        raise ValueError(f"d: {what} needs as many nodes as c, {num_nodes(c)}; got {num_nodes(d)}")
