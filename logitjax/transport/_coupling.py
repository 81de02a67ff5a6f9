"""The Gromov-Wasserstein cost of a given coupling: an upper bound of the optimum."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.transport._features import sparse_products
from logitjax.transport._graph import FactoredGraph, Graph, dense_factor, dense_matrix, num_nodes
from logitjax.transport._sorted import Coupling

# Up to this many matched pairs the graphs are compared entry by entry, without cancellation.
_EXACT_PAIRS = 4096
_BLOCK_ENTRIES = 1 << 22


def gw_at_coupling(c: Graph, d: Graph, coupling: Coupling, *, p: int = 2) -> Float[Array, ""]:
    """What a coupling costs: at least the Gromov-Wasserstein optimum.

    ::

        sum_{s, s'} m_s m_s' | C[r_s, r_s'] - D[k_s, k_s'] |^p

    over the coupling's pairs (row r, column k, mass m). Entries are compared in blocks of rows, so
    that no n x n array is held. For p = 2, factored graphs and more than 4,096 pairs it is instead
    the sum of T x T products, O(n (T_z^2 + T_w^2 + T_z T_w)) for dense factors::

        ||Z M Z^T||_F^2 + ||W M W^T||_F^2 - 2 ||Z M W^T||_F^2

    and O(T^2 k) for sparse ones under a permutation.

    The gradient is that at a fixed coupling: by the envelope theorem a subgradient of the cost
    where the coupling is optimal.

    Args:
        c: matrix ``[n, n]`` or `FactoredGraph`.
        d: matrix ``[m, m]`` or `FactoredGraph`.
        coupling: for example from `sorted_coupling` or `certificate`.
        p: power of the cost, at least 1.

    Returns:
        A scalar.

    >>> import jax.numpy as jnp
    >>> from logitjax.transport import sorted_coupling
    >>> c, d = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 1.0]])
    >>> gw_at_coupling(c, d, sorted_coupling(c.sum(1), d.sum(1)))
    Array(0.25, dtype=float32)

    References:
        Memoli (2011), definition 5.7, without his factor 1/2.
    """
    pairs = coupling.rows.shape[-1]
    if (
        p == 2
        and pairs > _EXACT_PAIRS
        and isinstance(c, FactoredGraph)
        and isinstance(d, FactoredGraph)
    ):
        if c.ids is not None and d.ids is not None and num_nodes(c) == num_nodes(d) == pairs:
            return _sparse_cost(c, d, coupling)
        return _factored_cost(dense_factor(c), dense_factor(d), coupling)
    left, right = _rows_of(c, coupling.rows), _rows_of(d, coupling.columns)
    mass = jnp.asarray(coupling.mass)
    block = max(1, min(pairs, _BLOCK_ENTRIES // max(pairs, 1)))

    @jax.checkpoint
    def rows(total, index):
        here = jnp.minimum(index, pairs - 1)
        difference = left(here) - right(here)
        power = jnp.square(difference) if p == 2 else jnp.abs(difference) ** p
        weight = jnp.where(index < pairs, mass[here], 0.0)
        return total + jnp.sum(weight[:, None] * power * mass), None

    index = jnp.arange(math.ceil(pairs / block) * block).reshape(-1, block)
    return jax.lax.scan(rows, jnp.zeros((), jnp.float32), index)[0]


def _rows_of(graph, nodes):
    """A function from pair numbers to rows of the graph, with all pairs' nodes as columns."""
    nodes = jnp.asarray(nodes)
    if isinstance(graph, FactoredGraph) and num_nodes(graph) > 2 * graph.values.shape[0]:
        z = dense_factor(graph)[:, nodes]
        return lambda here: z[:, here].T @ z
    matrix = dense_matrix(graph)

    def rows(here):
        return matrix[nodes[here]][:, nodes]

    return rows


def _factored_cost(z, w, coupling):
    z, w = z[:, coupling.rows], w[:, coupling.columns]
    mass = jnp.asarray(coupling.mass)

    def norm(x, y):
        block = max(1, _BLOCK_ENTRIES // max(len(y), x.shape[1]))

        @jax.checkpoint
        def one(row):
            return jnp.sum(jnp.square(y @ (row * mass)))

        return jnp.sum(jax.lax.map(one, x, batch_size=min(block, len(x))))

    return jnp.maximum(norm(z, z) + norm(w, w) - 2 * norm(z, w), 0.0)


def _sparse_cost(c, d, coupling):
    """Both graphs' nodes renamed to the number of their pair, then sparse T x T products."""
    n = num_nodes(c)
    pairs = jnp.arange(n, dtype=jnp.int32)

    def rename(graph, nodes):
        place = jnp.zeros(n, jnp.int32).at[nodes].set(pairs)
        return jnp.asarray(graph.values, jnp.float32), place[jnp.asarray(graph.ids)]

    left, right = rename(c, coupling.rows), rename(d, coupling.columns)

    def norm(x, y):
        return sparse_products(x[0], x[1], y[0], y[1], n)[0]

    value = norm(left, left) + norm(right, right) - 2 * norm(left, right)
    return jnp.maximum(value, 0.0) / n**2
