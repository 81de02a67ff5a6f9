"""A graph as a matrix or as its factor, and what the bounds need of either."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.transport._features import sparse_products


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredGraph:
    """The graph C = Z^T Z by its factor, so that n x n numbers are never held.

    Attributes:
        values: rows of Z, ``[T, n]``; with ids ``[T, k]``.
        ids: node of each value, int32 ``[T, k]``, each node at most once a row; None where Z is
            dense.
        num_nodes: n, static; needed with ids.
    """

    values: Array
    ids: Array | None = None
    num_nodes: int | None = dataclasses.field(default=None, metadata={"static": True})


# Anonymous axes, since two graphs in one signature may differ in size.
Graph = Float[Array, "_ _"] | FactoredGraph


def num_nodes(graph) -> int:
    if not isinstance(graph, FactoredGraph):
        if graph.ndim != 2 or graph.shape[0] != graph.shape[1]:
            raise ValueError(f"graph: expected a square matrix, got shape {graph.shape}")
        return graph.shape[0]
    if graph.ids is None:
        return graph.values.shape[-1]
    if graph.num_nodes is None:
        raise ValueError("graph: a FactoredGraph with ids needs num_nodes, got None")
    return graph.num_nodes


def dense_factor(graph: FactoredGraph) -> jax.Array:
    """Z as ``[T, n]``."""
    values = jnp.asarray(graph.values, jnp.float32)
    if graph.ids is None:
        return values
    rows = jnp.arange(values.shape[0])[:, None]
    empty = jnp.zeros((values.shape[0], num_nodes(graph)), jnp.float32)
    return empty.at[rows, jnp.asarray(graph.ids)].add(values, mode="drop")


def dense_matrix(graph) -> jax.Array:
    """C as ``[n, n]``, for the bounds that look at every entry."""
    if not isinstance(graph, FactoredGraph):
        return jnp.asarray(graph, jnp.float32)
    z = dense_factor(graph)
    return z.T @ z


def diagonal(graph) -> jax.Array:
    """The diagonal of C, ``[n]``, without C."""
    if not isinstance(graph, FactoredGraph):
        return jnp.diag(jnp.asarray(graph, jnp.float32))
    squares = jnp.square(jnp.asarray(graph.values, jnp.float32))
    if graph.ids is None:
        return squares.sum(0)
    empty = jnp.zeros(num_nodes(graph), jnp.float32)
    return empty.at[jnp.asarray(graph.ids)].add(squares, mode="drop")


def multiply(graph, factor):
    """The graph with C multiplied by a positive number."""
    if isinstance(graph, FactoredGraph):
        return dataclasses.replace(graph, values=graph.values * jnp.sqrt(factor))
    return graph * factor


def moments(graph, weights) -> tuple[jax.Array, jax.Array]:
    """Of each node, mean and mean square of its row: C a and (C * C) a; uniform a if None."""
    n = num_nodes(graph)
    a = jnp.full(n, 1.0 / n) if weights is None else jnp.asarray(weights, jnp.float32)
    if not isinstance(graph, FactoredGraph):
        c = jnp.asarray(graph, jnp.float32)
        return c @ a, jnp.square(c) @ a
    z = jnp.asarray(graph.values, jnp.float32)
    if graph.ids is None:
        mean = z.T @ (z @ a)
        if n <= z.shape[0]:
            return mean, jnp.square(z.T @ z) @ a
        gram = (z * a) @ z.T
        return mean, jnp.sum(z * (gram @ z), axis=0)
    ids = jnp.asarray(graph.ids)
    along = z * a.at[ids].get(mode="fill", fill_value=0.0)
    zeros = jnp.zeros(n, jnp.float32)
    mean = zeros.at[ids].add(z * along.sum(-1, keepdims=True), mode="drop")
    # (Z A Z^T Z) at the ids: the weights go with the left factor of the inner product.
    _, products = sparse_products(z, ids, z, ids, n, left=along)
    return mean, zeros.at[ids].add(z * products, mode="drop")


def check_weights(name: str, weights, n: int):
    if weights is not None and weights.shape != (n,):
        raise ValueError(f"{name}: expected shape ({n},), one weight a node; got {weights.shape}")
