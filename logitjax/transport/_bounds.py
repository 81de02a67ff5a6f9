"""Lower bounds of the Gromov-Wasserstein cost, from O(T k) to O(n^3).

All bound ``GW_p^p(C, D) = min_pi sum |C_ij - D_kl|^p pi_ik pi_jl`` (no factor 1/2) for any square
matrices, metrics or not, in this order::

    first <= moment <= third <= GW,   second <= sorted_rows <= third

Those that hold for matchings only, and are nearer, are in `logitjax.transport._matching_bounds`.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.transport._graph import Graph, check_weights, dense_matrix, moments, num_nodes
from logitjax.transport._sorted import sorted_gw_lower_bound

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

    ::

        W_p^p(C a, D b) <= GW_p^p(C, D)

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph`.
        d: matrix ``[m, m]`` or `FactoredGraph`.
        c_weights: node weights a that sum to one; uniform if left out.
        d_weights: node weights b.
        p: power of the cost, at least 1.

    Returns:
        A scalar.

    >>> import jax.numpy as jnp
    >>> first_lower_bound(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.zeros((2, 2)))
    Array(0.5, dtype=float32)

    References:
        Memoli (2011), definition 6.1; InfiGFusion (arXiv 2505.13893) prints it as the distance.
    """
    (f, _), (g, _) = _moments(c, d, c_weights, d_weights)
    return sorted_gw_lower_bound(f, g, f_weights=c_weights, g_weights=d_weights, p=p)


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

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph`.
        d: matrix ``[m, m]`` or `FactoredGraph`.
        c_weights: node weights that sum to one; uniform if left out.
        d_weights: the same for d.

    Returns:
        A scalar. It is at least `first_lower_bound` with p = 2.

    >>> import jax.numpy as jnp
    >>> moment_lower_bound(jnp.array([[1.0, -1.0], [-1.0, 1.0]]), jnp.zeros((2, 2)))
    Array(1., dtype=float32)

    References:
        The bound by moments is Gelbrich's (1990) on the line; its use here is ours.
    """

    def cost(f, g):
        return sorted_gw_lower_bound(f, g, f_weights=c_weights, g_weights=d_weights, p=2)

    (f, f_square), (g, g_square) = _moments(c, d, c_weights, d_weights)
    apart = cost(f, g) + cost(safe_sqrt(f_square - f * f), safe_sqrt(g_square - g * g))
    return jnp.maximum(apart, cost(safe_sqrt(f_square), safe_sqrt(g_square)))


def second_lower_bound(
    c: Graph,
    d: Graph,
    *,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
    p: int = 2,
) -> Float[Array, ""]:
    """Memoli's second lower bound: transport of all entries, O(n^2 log n).

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph` (whose matrix is formed).
        d: matrix ``[m, m]`` or `FactoredGraph`.
        c_weights: node weights that sum to one; uniform if left out.
        d_weights: the same for d.
        p: power of the cost.

    Returns:
        A scalar.

    >>> import jax.numpy as jnp
    >>> second_lower_bound(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.zeros((2, 2)))
    Array(1., dtype=float32)

    References:
        Memoli (2011), section 6.
    """
    x, y, a, b = _dense(c, d, c_weights, d_weights)
    if c_weights is None and d_weights is None:
        return sorted_gw_lower_bound(x.ravel(), y.ravel(), p=p)
    return sorted_gw_lower_bound(
        x.ravel(),
        y.ravel(),
        f_weights=jnp.outer(a, a).ravel(),
        g_weights=jnp.outer(b, b).ravel(),
        p=p,
    )


def sorted_rows_lower_bound(c: Graph, d: Graph, *, p: int = 2) -> Float[Array, ""]:
    """Sort each row, then each column, and compare entry by entry; O(n^2 log n).

    It relaxes the third bound, whose one matching of rows must suit all columns at once, by
    letting every column be matched on its own. Between the second and the third bound::

        mean_ij | sort_columns(sort_rows(C))_ij - sort_columns(sort_rows(D))_ij |^p <= GW_p^p

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph` (whose matrix is formed).
        d: the same, with as many nodes; uniform weights.
        p: power of the cost.

    Returns:
        A scalar.

    Raises:
        ValueError: if the numbers of nodes differ.

    >>> import jax.numpy as jnp
    >>> sorted_rows_lower_bound(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.zeros((2, 2)))
    Array(1., dtype=float32)
    """
    check_equal_sizes(c, d, "sorted_rows_lower_bound")
    x, y = (jnp.sort(jnp.sort(dense_matrix(g), axis=1), axis=0) for g in (c, d))
    return jnp.mean(jnp.abs(x - y) ** p)


def third_lower_bound(
    c: Graph,
    d: Graph,
    *,
    c_weights: Float[Array, "n"] | None = None,
    d_weights: Float[Array, "m"] | None = None,
    p: int = 2,
) -> Float[Array, ""]:
    """Memoli's third lower bound: transport of the rows' distributions, O(n^3).

    ::

        min_pi sum_ik W_p^p(C_i., D_k.) pi_ik <= GW_p^p(C, D)

    Equal sizes without weights: exact, by the Hungarian algorithm. Otherwise the dual of that
    transport problem is ascended and its value returned, which is a lower bound at any iteration.

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph` (whose matrix is formed).
        d: matrix ``[m, m]`` or `FactoredGraph`.
        c_weights: node weights that sum to one; uniform if left out.
        d_weights: the same for d.
        p: power of the cost.

    Returns:
        A scalar. The gradient is that of the cost at the matching found.

    >>> import jax.numpy as jnp
    >>> third_lower_bound(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.zeros((2, 2)))
    Array(1., dtype=float32)

    References:
        Memoli (2011), section 6.
    """
    x, y, a, b = _dense(c, d, c_weights, d_weights)
    if x.shape == y.shape and c_weights is None and d_weights is None:
        x, y = jnp.sort(x, axis=1), jnp.sort(y, axis=1)
        costs = row_costs(jax.lax.stop_gradient(x), jax.lax.stop_gradient(y), p)
        i, k = optax.assignment.hungarian_algorithm(costs)
        return jnp.mean(jnp.abs(x[i] - y[k]) ** p)

    def cost(row, other):
        return sorted_gw_lower_bound(row, other, f_weights=a, g_weights=b, p=p)

    costs = jax.lax.map(lambda row: jax.vmap(lambda other: cost(row, other))(y), x)
    return _dual_value(costs, a, b)


def row_costs(x, y, p):
    """Mean |x_i - y_k|^p of sorted rows, ``[n, m]``, a few rows at a time."""

    def one(row):
        return jnp.mean(jnp.abs(row - y) ** p, axis=-1)

    return jax.lax.map(one, x, batch_size=min(_ROWS, x.shape[0]))


def _dual_value(costs, a, b, steps=200):
    """A feasible dual value of the transport problem, by annealed soft c-transforms."""
    fixed = jax.lax.stop_gradient(costs)
    scale = jnp.maximum(fixed.mean(), jnp.finfo(jnp.float32).tiny)
    log_b = jnp.log(b)

    def step(v, temperature):
        u = -temperature * jax.nn.logsumexp((v - fixed) / temperature + log_b, axis=1)
        log_a = jnp.log(a)[:, None]
        v = -temperature * jax.nn.logsumexp((u[:, None] - fixed) / temperature + log_a, axis=0)
        return v, None

    temperatures = scale * jnp.geomspace(1.0, 1e-3, steps)
    v, _ = jax.lax.scan(step, jnp.zeros_like(b), temperatures)
    # At the best u the value depends on the costs through the second term alone.
    u = jax.lax.stop_gradient(jnp.min(fixed - v, axis=1))
    return a @ u + b @ jnp.min(costs - u[:, None], axis=0)


def _moments(c, d, c_weights, d_weights):
    check_weights("c_weights", c_weights, num_nodes(c))
    check_weights("d_weights", d_weights, num_nodes(d))
    return moments(c, c_weights), moments(d, d_weights)


def _dense(c, d, c_weights, d_weights):
    x, y = dense_matrix(c), dense_matrix(d)
    check_weights("c_weights", c_weights, len(x))
    check_weights("d_weights", d_weights, len(y))
    a, b = (
        jnp.full(len(m), 1.0 / len(m)) if w is None else jnp.asarray(w, jnp.float32)
        for m, w in ((x, c_weights), (y, d_weights))
    )
    return x, y, a, b


def check_equal_sizes(c, d, what):
    if num_nodes(c) != num_nodes(d):
        raise ValueError(f"d: {what} needs as many nodes as c, {num_nodes(c)}; got {num_nodes(d)}")


def safe_sqrt(x):
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)
