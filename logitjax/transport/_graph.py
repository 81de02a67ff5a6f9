"""A graph as a matrix or as its factor, and the properties that bounds need."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from logitjax import ops
from logitjax.ops import Array
from logitjax.transport import _features as features
from logitjax.transport._rounding import (
    Scalar,
    Vector,
    Weights,
    deviation_of,
    gamma,
    real,
    safe_sqrt,
    sqrt_error,
    times_power_of_two,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredGraph:
    """The graph C = Z^T Z by its factor, so that n x n numbers are never stored.

    Attributes:
        values: rows of Z, ``[T, n]``; with ids ``[T, k]``.
        ids: node of each value, int32 ``[T, k]``, each node at most once per row; None if Z is
            dense. A value whose id is negative, or at least n, belongs to no node.
        num_nodes: n, static; needed with ids.
    """

    values: Array
    ids: Array | None = None
    num_nodes: int | None = dataclasses.field(default=None, metadata={"static": True})

    def squared_distance(
        self, other: "FactoredGraph", sequence_axis_name: str | None = None
    ) -> tuple[Float[jax.Array, "*batch"], Float[jax.Array, "*batch"]]:
        """The squared Frobenius norm of C - D of graphs on the same nodes, and its rounding.

        Dense factors are multiplied out; sparse ones are compared only by their rows. So that
        nothing cancels, with A = Z - W and B = Z + W, padded to equally many rows::

            |C - D|^2 = |A^T B + B^T A|^2 / 4 = (<A A^T, B B^T> + <A B^T, B A^T>) / 2

        Args:
            other: D = W^T W, with ids in the same range, or dense as this one.
            sequence_axis_name: mesh axis that shards the rows of both, inside ``shard_map``.

        Returns:
            Value and rounding, `[*batch]`: leading axes of values and ids are separate graphs. The
            true value is at most the sum of both. The rounding has no gradient.
        """
        axis = sequence_axis_name
        if self.ids is None:
            value, rounding = _dense_distance(self.values, other.values, axis)
        else:
            value, rounding = _sparse_distance(self, other, axis)
        return value, jax.lax.stop_gradient(rounding)


def _dense_distance(z: Array, w: Array, axis: str | None) -> tuple[jax.Array, jax.Array]:
    z, w = real(z), real(w)
    c, d = (ops.mesh.psum(jnp.einsum("...tu,...tw->...uw", x, x), axis) for x in (z, w))
    value = jnp.sum(jnp.sum(jnp.square(c - d), axis=-1), axis=-1)
    squares = [jnp.sum(jnp.sum(jnp.square(x), -1), -1) for x in (z, w)]
    trace = ops.mesh.psum(squares[0] + squares[1], axis)
    shards = 1 if axis is None else jax.lax.axis_size(axis)
    root = gamma(shards * max(z.shape[-2], w.shape[-2])) * trace
    # (x + root)^2 - x^2 at x = sqrt(value), and a little for what rounds that.
    rounding = 2 * gamma(2 * z.shape[-1]) * value + 2.01 * jnp.sqrt(value) * root + 1.01 * root**2
    if z.shape == w.shape:
        # Equal factors have equal products, however those are rounded.
        differ = ops.mesh.psum(jnp.sum(z != w, axis=(-2, -1), dtype=jnp.float32), axis)
        rounding = jnp.where(differ > 0, rounding, 0.0)
    return value, rounding


def _sparse_distance(
    c: FactoredGraph, d: FactoredGraph, axis: str | None
) -> tuple[jax.Array, jax.Array]:
    local = features.merged_rows(c.values, c.ids, d.values, d.ids)
    every = tuple(features.gather_positions(x, x.ndim - 2, axis) for x in local)

    def one(*parts: jax.Array) -> Any:
        arguments: Any = (*parts, num_nodes(c))
        return features.sparse_difference(*arguments)

    # Rounding may go below 0.
    value = jnp.maximum(ops.mesh.psum(features.over_batch(one, *local, *every), axis), 0.0)
    a, b = (ops.mesh.psum(jnp.sum(jnp.sum(jnp.square(x), -1), -1), axis) for x in local[:2])
    # Each of the two inner products is at most the product of the traces.
    positions, width = every[0].shape[-2:]
    return value, 2 * gamma(2 * width + 3 * positions) * a * b


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedMatrix:
    """A matrix ``[n, n]`` that is off by at most ``error``, in the norm of L_2(a x a)."""

    matrix: Any
    error: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProductGraph:
    """The matrix L^T R by its factors ``[rank, n]`` and ``[rank, m]``, as low-rank ones of ott."""

    left: Any
    right: Any


# Anonymous axes, since two graphs in one signature may differ in size.
Graph = Float[Array, "_ _"] | FactoredGraph | RoundedMatrix | ProductGraph


def _factored_nodes(graph: FactoredGraph) -> int:
    values, ids = graph.values, graph.ids
    if jnp.ndim(values) < 2:
        raise ValueError(f"values: expected rows [positions, nodes], got {list(jnp.shape(values))}")
    if ids is None:
        ops.checks.shapes(values=(values, "number *positions nodes"))
        return values.shape[-1]
    ops.checks.shapes(values=(values, "number *positions k"), ids=(ids, "int *positions k"))
    if graph.num_nodes is None:
        raise ValueError("num_nodes: expected the number of nodes beside ids, got None")
    return graph.num_nodes


def num_nodes(graph: Any) -> int:
    if isinstance(graph, RoundedMatrix):
        return graph.matrix.shape[0]
    if isinstance(graph, ProductGraph):
        return graph.left.shape[1]
    if not isinstance(graph, FactoredGraph):
        if graph.ndim != 2 or graph.shape[0] != graph.shape[1]:
            raise ValueError(f"graph: expected a square matrix, got shape {graph.shape}")
        nodes = graph.shape[0]
    else:
        nodes = _factored_nodes(graph)
    if nodes < 1:
        raise ValueError(f"graph: expected at least one node, got {nodes}")
    return nodes


def dense_factor(graph: FactoredGraph) -> jax.Array:
    """Z as ``[T, n]``."""
    values = real(graph.values)
    if graph.ids is None:
        return values
    rows = jnp.arange(values.shape[0])[:, None]
    empty = jnp.zeros((values.shape[0], num_nodes(graph)), values.dtype)
    return empty.at[rows, features.drop_negative(graph.ids)].add(values, mode="drop")


def dense_matrix(graph: Any) -> jax.Array:
    if isinstance(graph, RoundedMatrix):
        return jnp.asarray(graph.matrix)
    if not isinstance(graph, FactoredGraph | ProductGraph):
        return real(graph)
    left, right = dense_factors(graph)
    return left.T @ right


def dense_factors(graph: FactoredGraph | ProductGraph) -> tuple[jax.Array, jax.Array]:
    """L and R of C = L^T R."""
    if isinstance(graph, ProductGraph):
        return real(graph.left), real(graph.right)
    factor = dense_factor(graph)
    return factor, factor


def applied(graph: Graph, x: jax.Array) -> jax.Array:
    """Compute C x, without C if the graph has factors."""
    if isinstance(graph, FactoredGraph | ProductGraph):
        left, right = dense_factors(graph)
        return left.T @ (right @ x)  # never n x n
    return dense_matrix(graph) @ x


def rounded(graph: Graph, weights: Weights = None) -> RoundedMatrix:
    """C as ``[n, n]``, with the possible error of its computation."""
    if isinstance(graph, RoundedMatrix):
        return graph
    if not isinstance(graph, FactoredGraph | ProductGraph):
        return RoundedMatrix(real(graph), real(0.0))
    return RoundedMatrix(dense_matrix(graph), product_error(graph, node_weights(graph, weights)))


def product_error(
    graph: FactoredGraph | ProductGraph, mass: jax.Array, nodes: Any = slice(None)
) -> jax.Array:
    """Bound the error of C once it is multiplied out, in the L_2 norm of masses at nodes."""
    # In L_1 as in L_2, | |L|^T |R| | is at most the product of norms; of Z^T Z, the trace.
    norms = [jnp.sum(mass * norm[nodes]) for norm in factor_norms(graph)]
    return jax.lax.stop_gradient(gamma(rank(graph)) * jnp.sqrt(norms[0] * norms[1]))


def factor_norms(graph: FactoredGraph | ProductGraph) -> tuple[Vector, Vector]:
    if isinstance(graph, ProductGraph):
        return jnp.square(real(graph.left)).sum(0), jnp.square(real(graph.right)).sum(0)
    norms = norms_squared(graph)
    return norms, norms


def rank(graph: FactoredGraph | ProductGraph) -> int:
    return len(graph.left if isinstance(graph, ProductGraph) else graph.values)


def norms_squared(graph: FactoredGraph) -> jax.Array:
    """The diagonal of C, ``[n]``, without C."""
    squares = jnp.square(real(graph.values))
    if graph.ids is None:
        return squares.sum(0)
    empty = jnp.zeros(num_nodes(graph), squares.dtype)
    return empty.at[features.drop_negative(graph.ids)].add(squares, mode="drop")


def largest(graph: Graph) -> Scalar:
    """An upper bound of the largest absolute entry of C."""
    if isinstance(graph, FactoredGraph | ProductGraph):
        left, right = factor_norms(graph)
        # Cauchy-Schwarz: no entry is larger than the longest columns allow.
        return jnp.sqrt(left.max()) * jnp.sqrt(right.max()) * (1 + 2 * gamma(rank(graph)))
    matrix = dense_matrix(graph)
    # The largest entry of a rounded Gram matrix is on the diagonal, off by much less than half.
    return jnp.abs(matrix).max() * (1.5 if isinstance(graph, RoundedMatrix) else 1.0)


def diagonal(graph: Graph) -> Vector:
    if isinstance(graph, FactoredGraph):
        return norms_squared(graph)
    return jnp.diag(dense_matrix(graph))


def multiply(graph: Graph, factor: Any) -> Any:
    """The graph with C multiplied by a positive number."""
    if isinstance(graph, FactoredGraph):
        return dataclasses.replace(graph, values=graph.values * jnp.sqrt(factor))
    if isinstance(graph, ProductGraph):
        return dataclasses.replace(graph, left=graph.left * factor)
    return graph * factor


def parts(graph: Any) -> list[Any]:
    if isinstance(graph, ProductGraph):
        return [graph.left, graph.right]
    return [graph.values if isinstance(graph, FactoredGraph) else graph]


def with_parts(graph: Any, new: Sequence[Any]) -> Any:
    if isinstance(graph, ProductGraph):
        return ProductGraph(*new)
    return dataclasses.replace(graph, values=new[0]) if isinstance(graph, FactoredGraph) else new[0]


def half_exponent(graph: Graph) -> Int[jax.Array, ""]:
    """The h for which the numbers that form C / 4^h are at most about one."""
    largest_part = jnp.stack([jnp.max(jnp.abs(real(x)), initial=0.0) for x in parts(graph)]).max()
    exponent = jnp.frexp(largest_part)[1]
    return exponent if isinstance(graph, FactoredGraph | ProductGraph) else (exponent + 1) // 2


def shifted(graph: Graph, half: Int[jax.Array, ""]) -> Any:
    """C 4^half, exactly, unless numbers become negligibly small next to the largest."""
    steps = half if isinstance(graph, FactoredGraph | ProductGraph) else 2 * half
    return with_parts(graph, [times_power_of_two(real(x), steps) for x in parts(graph)])


class RowStatistics(NamedTuple):
    """Mean, deviation, RMS and mean square of each node's row, and their error bounds."""

    mean: jax.Array
    deviation: jax.Array
    rms: jax.Array
    square: jax.Array
    mean_error: jax.Array
    deviation_error: jax.Array
    rms_error: jax.Array
    square_error: jax.Array


def row_statistics(graph: Graph, weights: Weights) -> RowStatistics:
    """Statistics of the rows of the graph, or of its matrix; rounding bounds have no gradient."""
    n, a = num_nodes(graph), node_weights(graph, weights)
    if not isinstance(graph, FactoredGraph | ProductGraph):
        c = dense_matrix(graph)
        mean, square = c @ a, jnp.square(c) @ a
        variance = jnp.square(c - mean[:, None]) @ a
        rms, deviation = safe_sqrt(square), safe_sqrt(variance)
        mean_error = gamma(2 * n) * (jnp.abs(c) @ a)
        errors = (
            mean_error,
            mean_error + gamma(2 * n) * deviation,
            gamma(2 * n) * rms,
            gamma(2 * n) * square,
        )
    else:
        mean, square = moments(graph, weights)
        width = n if isinstance(graph, ProductGraph) else graph.values.shape[1]
        # Room for a matrix that is formed and squared, and for weights divided by their sum.
        count = width + 2 * rank(graph) + 64 + n * (weights is not None)
        norms, others = (safe_sqrt(x) for x in factor_norms(graph))
        first, second = jnp.sum(a * others), jnp.sum(a * jnp.square(others))
        mean_error = gamma(count) * norms * first
        square_error = gamma(count) * jnp.square(norms) * second
        rms = safe_sqrt(square)
        deviation, deviation_error = deviation_of(mean, square, mean_error, square_error)
        errors = mean_error, deviation_error, sqrt_error(square, square_error), square_error
    return RowStatistics(mean, deviation, rms, square, *jax.lax.stop_gradient(errors))


def moments(graph: FactoredGraph | ProductGraph, weights: Weights) -> tuple[Vector, Vector]:
    """Mean and mean square of each node's row: C a and (C * C) a; uniform a if None."""
    n, a = num_nodes(graph), node_weights(graph, weights)
    if isinstance(graph, ProductGraph):
        left, right = dense_factors(graph)
        gram = (right * a) @ right.T
        return left.T @ (right @ a), jnp.sum(left * (gram @ left), axis=0)
    z = real(graph.values)
    if graph.ids is None:
        mean = z.T @ (z @ a)
        # By the smaller square: sum_w a_w C_uw^2 = z_u^T (Z A Z^T) z_u, n x n numbers or T x T.
        if n <= z.shape[0]:
            return mean, jnp.square(z.T @ z) @ a
        gram = (z * a) @ z.T
        return mean, jnp.sum(z * (gram @ z), axis=0)
    ids = features.drop_negative(graph.ids)
    along = z * a.at[ids].get(mode="fill", fill_value=0.0)
    zeros = jnp.zeros(n, z.dtype)
    mean = zeros.at[ids].add(z * along.sum(-1, keepdims=True), mode="drop")
    # (Z A Z^T Z) at the ids: the weights go with the left factor of the inner product.
    _, products = features.sparse_products(z, ids, z, ids, n, left=along)
    return mean, zeros.at[ids].add(z * products, mode="drop")


def node_weights(graph: Graph, weights: Weights) -> Vector:
    n = num_nodes(graph)
    if weights is None:
        return jnp.full(n, 1.0 / n, real(0.0).dtype)
    weights = real(weights)
    return weights / weights.sum()


def check_power(p: int) -> None:
    if p not in (1, 2):
        raise ValueError(f"p: expected 1 or 2, got {p}")


def check_weights(name: str, weights: Weights, n: int) -> None:
    """ValueError for another shape and, if values are known, for an invalid distribution."""
    if weights is None:
        return
    if weights.shape != (n,):
        raise ValueError(f"{name}: expected shape ({n},), one weight a node; got {weights.shape}")
    if isinstance(weights, Tracer):
        return
    values = np.asarray(weights, np.float64)
    ops.checks.values(
        values, lambda x: (x >= 0) & (x < np.inf), name, "finite weights from zero up"
    )
    total = values.sum()
    if not abs(total - 1) <= 1e-3:
        raise ValueError(f"{name}: expected weights that sum to one, got a sum of {total:g}")
