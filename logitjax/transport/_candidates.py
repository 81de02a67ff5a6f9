"""Couplings to start from: those that sort by a feature, and the cheapest of several."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.transport._coupling import coupling_cost
from logitjax.transport._graph import FactoredGraph, Graph, num_nodes, rounded, row_statistics
from logitjax.transport._rounding import Order, Weights, real
from logitjax.transport._sorted import Coupling, sorted_coupling

# Up to this many nodes, a graph of more positions than nodes is multiplied out.
_DENSE_NODES = 2048


def densest(graph: Graph, weights: Weights) -> Graph:
    """Return the matrix itself if it is small, and smaller than its factor."""
    if isinstance(graph, FactoredGraph):
        n = num_nodes(graph)
        if n <= min(_DENSE_NODES, graph.values.shape[0]):
            return rounded(graph, weights)
    return graph


def uniform_matching(matching: Order) -> Coupling:
    n = len(matching)
    return Coupling(jnp.arange(n, dtype=jnp.int32), matching, jnp.full(n, 1.0 / n, real(0.0).dtype))


def best_sorted_coupling(
    c: Graph, d: Graph, p: int, candidates: Sequence[Coupling], rest: Mapping[str, Any]
) -> tuple[Coupling, Float[jax.Array, "plans"]]:
    """The cheapest of three sorted couplings and `candidates`, and the cost of each candidate."""
    # In this order; without a gradient.
    weights = rest["c_weights"], rest["d_weights"]
    local, other = (row_statistics(densest(g, w), w) for g, w in zip((c, d), weights, strict=True))
    plans = [
        sorted_coupling(
            getattr(local, name), getattr(other, name), f_weights=weights[0], g_weights=weights[1]
        )
        for name in ("rms", "mean", "deviation")
    ]
    return cheapest(c, d, [*plans, *candidates], p, rest)


def cheapest(
    c: Graph, d: Graph, plans: Sequence[Coupling], p: int, rest: Mapping[str, Any]
) -> tuple[Coupling, Float[jax.Array, "plans"]]:
    """The plan with the least proven cost; shorter ones are padded with entries of no mass."""
    longest = max(plan.rows.shape[-1] for plan in plans)
    dtype = real(0.0).dtype

    def pad(plan: Coupling) -> Coupling:
        size = longest - plan.rows.shape[-1]
        return Coupling(
            jnp.pad(jnp.asarray(plan.rows, jnp.int32), (0, size)),
            jnp.pad(jnp.asarray(plan.columns, jnp.int32), (0, size)),
            jnp.pad(jnp.asarray(plan.mass, dtype), (0, size)),
        )

    def most(plan: Coupling) -> jax.Array:
        return coupling_cost(c, d, plan, p=p, **rest).most

    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *map(pad, plans))
    if all(plan.rows.shape[-1] == longest for plan in plans):
        # One program for all.
        costs = jax.lax.map(most, stacked)
    else:
        costs = jnp.stack([most(plan) for plan in plans])
    best = jnp.argmin(costs)
    return jax.tree.map(lambda x: x[best], stacked), costs
