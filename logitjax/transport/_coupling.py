"""The Gromov-Wasserstein cost of a given coupling: an upper bound of the optimum."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax.ops import Array, checks
from logitjax.transport import _graph as graphs
from logitjax.transport._features import drop_negative
from logitjax.transport._graph import FactoredGraph, Graph, ProductGraph, RoundedMatrix, num_nodes
from logitjax.transport._linear import Linear, linear_at_coupling
from logitjax.transport._rounding import UNDERFLOW, Scalar, Weights, gamma, real
from logitjax.transport._sorted import Coupling

# Up to this many matched pairs the graphs are compared entry by entry, without cancellation.
_EXACT_PAIRS = 4096
_BLOCK_ENTRIES = 1 << 22


def gw_at_coupling(c: Graph, d: Graph, coupling: Coupling, *, p: int = 2) -> Float[Array, ""]:
    """The cost of a coupling: up to rounding an upper bound of the Gromov-Wasserstein optimum.

    `certificate` adds a bound of the rounding. The cost is::

        sum_{s, s'} m_s m_s' | C[r_s, r_s'] - D[k_s, k_s'] |^p

    over the coupling's pairs (row r, column k, mass m). Entries are compared in blocks of rows, so
    that no n x n array is held. For p = 2, factored graphs and more than 4,096 pairs it is instead
    a sum of T x T products of A = Z - W and B = Z + W, nodes matched, O(n T^2) for dense factors::

        (<A M A^T, B M B^T> + <A M B^T, B M A^T>) / 2

    and O(T^2 k) for sparse ones under a permutation. Nothing cancels where the graphs agree.

    If the fixed coupling is optimal, the gradient there is a subgradient (envelope theorem).

    Args:
        c, d: matrices ``[n, n]`` and ``[m, m]``, or `FactoredGraph`.
        coupling: for example from `sorted_coupling` or `certificate`.
        p: power of the cost, 1 or 2.

    Raises:
        TypeError: nodes of the coupling are not integers, or its masses not floating point.
        ValueError: p is neither 1 nor 2, a graph is not square, the coupling's arrays differ in
            length, or it names a node that does not exist (the cost is nan under ``jit``).

    >>> import jax, numpy as np
    >>> from logitjax.transport import sorted_coupling
    >>> c, d = np.diag([2.0, 0.0]), np.diag([0.0, 1.0])
    >>> jax.jit(lambda c, d: gw_at_coupling(c, d, sorted_coupling(c.sum(1), d.sum(1))))(c, d)
    Array(0.25, dtype=float32)

    References:
        Memoli (2011), definition 5.7, without his factor 1/2.
    """
    graphs.check_power(p)
    rows, columns, mass = coupling.rows, coupling.columns, coupling.mass
    checks.shapes(
        rows=(rows, "int pairs"), columns=(columns, "int pairs"), mass=(mass, "float pairs")
    )
    array = jnp.array(True)
    for name, ids, graph in (("rows", rows, c), ("columns", columns, d)):
        checks.ids(ids, num_nodes(graph), name)
        array &= jnp.all((jnp.asarray(ids) >= 0) & (jnp.asarray(ids) < num_nodes(graph)))
    value = coupling_cost(c, d, coupling, p=p).value
    return jnp.where(array, value, jnp.nan)


class Cost(NamedTuple):
    """The cost of a coupling with its gradient, and an upper bound of it."""

    value: jax.Array
    most: jax.Array


def coupling_cost(
    c: Graph,
    d: Graph,
    coupling: Coupling,
    *,
    p: int,
    c_weights: Weights = None,
    d_weights: Weights = None,
    linear: Linear = None,
    error: Any = 0.0,
) -> Cost:
    """The cost of a coupling, and a proven bound of the cost of the nearest true coupling.

    A permutation of equal sizes without weights is exact. Otherwise mass missing in the marginals
    may be moved anywhere, at the cost of the largest difference of two entries.
    """
    pairs, n, m = coupling.rows.shape[-1], num_nodes(c), num_nodes(d)
    rows, columns = jnp.asarray(coupling.rows), jnp.asarray(coupling.columns)
    mass = real(coupling.mass)
    row_mass = jnp.zeros(n, mass.dtype).at[rows].add(mass)
    column_mass = jnp.zeros(m, mass.dtype).at[columns].add(mass)
    # Mass that must be moved before the masses have the marginals of a coupling.
    surplus = (
        jnp.maximum(1 - mass.sum(), 0.0)
        + jnp.maximum(row_mass - graphs.node_weights(c, c_weights), 0.0).sum()
        + jnp.maximum(column_mass - graphs.node_weights(d, d_weights), 0.0).sum()
        + jnp.maximum(-mass, 0.0).sum() * 4
        + 4 * gamma(pairs + n + m)
    )
    if pairs == n == m and c_weights is None and d_weights is None:
        each = jnp.zeros((2, n), jnp.int32).at[0, rows].add(1).at[1, columns].add(1)
        matching = jnp.all(each == 1) & jnp.all(jnp.abs(mass - 1 / n) <= 1e-3 / n)
        mass = jnp.where(matching, 1 / n, mass)
        # A permutation has its marginals exactly: rounding of 1 / n is not missing mass.
        surplus = jnp.where(matching, 0.0, surplus)
    coupling = Coupling(rows, columns, mass)
    root = jnp.zeros_like(mass[0])
    factors = (c, d) if isinstance(c, FactoredGraph) and isinstance(d, FactoredGraph) else None
    many = p == 2 and pairs > _EXACT_PAIRS
    if many and factors:
        if n == m == pairs and all(graph.ids is not None for graph in factors):
            value, absolute = _sparse_cost(*factors, coupling)
        else:
            z, w = map(graphs.dense_factor, factors)
            value, absolute = _factored_cost(z, w, coupling)
        most = value + absolute
    elif many and isinstance(c, ProductGraph) and isinstance(d, ProductGraph):
        value, absolute = _product_cost(c, d, coupling)
        most = value + absolute
    else:
        value, differ = _entrywise_cost(c, d, coupling, p)
        most = value * (1 + gamma(3 * pairs)) + UNDERFLOW * differ
        root = formation_error(c, mass, rows) + formation_error(d, mass, columns)
        # Exactly equal rows of factors have equal products, however those are rounded.
        if factors:
            z, w = map(graphs.dense_factor, factors)
            z, w = z[:, rows], w[:, columns]
            same = z.shape == w.shape and jnp.all((z == w) | (mass == 0))
            most = jnp.where(same, 0.0, most)
            root = jnp.where(same, 0.0, root)
    # Errors of casts count like those of products.
    root += error
    most = jnp.where(root > 0, jnp.maximum(most, UNDERFLOW), most)
    most = (most + root) if p == 1 else jnp.square(jnp.sqrt(most) + root)
    # No two entries are further apart, wherever the surplus goes.
    reach = (graphs.largest(c) + graphs.largest(d)) ** p
    added, most_added = linear_at_coupling(linear, coupling, 2 * surplus)
    most = most + 2 * surplus * reach + most_added
    return Cost(value + added, jax.lax.stop_gradient(most + gamma(8) * jnp.abs(most)))


def formation_error(
    graph: Graph, mass: Float[jax.Array, "pairs"], nodes: Int[jax.Array, "pairs"]
) -> Any:
    """Bound the errors of the entries in `_entrywise_cost`, in the norm of the coupling."""
    if isinstance(graph, FactoredGraph | ProductGraph):
        return graphs.product_error(graph, mass, nodes)
    return graph.error if isinstance(graph, RoundedMatrix) else 0.0


def _entrywise_cost(
    c: Graph, d: Graph, coupling: Coupling, p: int
) -> tuple[Scalar, Bool[jax.Array, ""]]:
    """The cost, and whether any entries differ at all."""
    pairs, mass = coupling.rows.shape[-1], coupling.mass
    left, right = _rows_of(c, coupling.rows), _rows_of(d, coupling.columns)
    block = max(1, min(pairs, _BLOCK_ENTRIES // max(pairs, 1)))

    @jax.checkpoint
    def rows(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[Any, None]:
        total, differ = carry
        here = jnp.minimum(index, pairs - 1)
        difference = left(here) - right(here)
        power = jnp.square(difference) if p == 2 else jnp.abs(difference)
        weight = jnp.where(index < pairs, mass[here], 0.0)
        # Row by row: a single sum of all entries would have a rounding bound of their number.
        return (total + weight @ (power @ mass), differ | jnp.any(difference != 0)), None

    index = jnp.arange(math.ceil(pairs / block) * block).reshape(-1, block)
    start = jnp.zeros((), mass.dtype), jnp.zeros((), bool)
    return jax.lax.scan(rows, start, index)[0]


def _rows_of(graph: Graph, nodes: Int[Array, "pairs"]) -> Callable[[jax.Array], jax.Array]:
    """A function from pair indices to rows of the graph, with all pairs' nodes as columns."""
    nodes = jnp.asarray(nodes)
    factored = isinstance(graph, FactoredGraph | ProductGraph)
    if factored and num_nodes(graph) > 2 * graphs.rank(graph):
        left, right = (x[:, nodes] for x in graphs.dense_factors(graph))
        return lambda here: left[:, here].T @ right
    matrix = graphs.dense_matrix(graph)
    return lambda here: matrix[nodes[here]][:, nodes]


def _factored_cost(
    z: Float[jax.Array, "s n"], w: Float[jax.Array, "t m"], coupling: Coupling
) -> tuple[Scalar, Any]:
    """Form T x T products of A = Z - W and B = Z + W, with a bound of the rounding loss."""
    z, w = z[:, coupling.rows], w[:, coupling.columns]
    z, w = (jnp.pad(x, ((0, max(len(z), len(w)) - len(x)), (0, 0))) for x in (z, w))
    a, b, mass = z - w, z + w, coupling.mass
    block = max(1, _BLOCK_ENTRIES // max(len(z), z.shape[1]))

    @jax.checkpoint
    def one(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = rows
        x, y = x * mass, y * mass
        return (a @ x) @ (b @ y) + (b @ x) @ (a @ y)

    total = jnp.sum(jax.lax.map(one, (a, b), batch_size=min(block, len(z))))
    # Each of the sums is at most the product of the two traces.
    trace = (jnp.sum(jnp.square(x) @ mass) for x in (a, b))
    absolute = 2 * gamma(2 * z.shape[1] + 3 * len(z)) * math.prod(trace)
    return jnp.maximum(total / 2, 0.0), absolute


def _product_cost(c: ProductGraph, d: ProductGraph, coupling: Coupling) -> tuple[Scalar, Scalar]:
    """C - D at the pairs has low rank: U^T V of stacked factors, ``<U M U^T, V M V^T>``."""
    left, right = (
        jnp.concatenate([sign * real(x)[:, coupling.rows], real(y)[:, coupling.columns]])
        for x, y, sign in ((c.left, d.left, -1), (c.right, d.right, 1))
    )
    mass = coupling.mass
    total = jnp.sum(((left * mass) @ left.T) * ((right * mass) @ right.T))
    norms = [jnp.sum(jnp.square(x) @ mass) for x in (left, right)]
    absolute = 2 * gamma(2 * len(mass) + 3 * len(left)) * norms[0] * norms[1]
    return jnp.maximum(total, 0.0), absolute


def _sparse_cost(c: FactoredGraph, d: FactoredGraph, coupling: Coupling) -> tuple[Scalar, Scalar]:
    """Both graphs' nodes renamed to the number of their pair, then sparse T x T products."""
    n = num_nodes(c)

    def rename(graph: FactoredGraph, nodes: Array) -> FactoredGraph:
        location = jnp.zeros(n, jnp.int32).at[nodes].set(jnp.arange(n, dtype=jnp.int32))
        ids = drop_negative(graph.ids)
        return FactoredGraph(real(graph.values), location.at[ids].get(mode="fill", fill_value=n), n)

    left, right = rename(c, coupling.rows), rename(d, coupling.columns)
    value, rounding = left.squared_distance(right)
    return value / n**2, rounding / n**2
