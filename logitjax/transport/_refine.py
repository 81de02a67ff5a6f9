"""Local search over matchings of two graphs of equal size, p = 2."""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from logitjax.transport._rounding import Order, Scalar

Kind = Literal["exchange", "search"]

# Both graphs, and the additional value of matching node i with node k, or None.
Graphs = tuple[jax.Array, jax.Array, jax.Array | None]
# A matching and its objective.
_Found = tuple[jax.Array, jax.Array]

# Share of the objective that a move must gain, or float32 noise would prolong the search.
_GAIN = 1e-6


@dataclasses.dataclass(frozen=True)
class Refinement:
    """Improvement of a matching of two graphs by `certificate`.

    Attributes:
        kind: ``exchange`` swaps pairs of nodes, an n^3 matrix product per step; ``search`` also
            takes conditional-gradient steps (Hungarian algorithm), then ``restarts`` times both
            from a perturbed matching.
        steps: maximum number of steps of each kind in a row.
        restarts: number of restarts of ``search``.

    >>> Refinement("exchange").steps
    100
    """

    kind: Kind
    steps: int = 100
    restarts: int = 8

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"refine: expected one of {get_args(Kind)}, got {self.kind!r}")


def refine_matching(graphs: Graphs, matching: Order, *, how: Refinement, key: jax.Array) -> Order:
    """Raise ``sum_ij C_ij D_{q_i q_j} + sum_i A_{i q_i}`` from the matching q.

    With A the cost of a linear term times -n / 2, the cost falls by two n-squareth of the gain.
    """
    n, steps, restarts = len(matching), how.steps, how.restarts
    best = _climb(_exchange, graphs, (matching, _objective(graphs, matching)), steps)
    if how.kind == "exchange":
        return best[0]

    def both(q: jax.Array) -> _Found:
        moved = _climb(_assignment, graphs, (q, _objective(graphs, q)), steps)
        return _climb(_exchange, graphs, moved, steps)

    def better_of(one: _Found, other: _Found) -> _Found:
        return jax.tree.map(lambda a, b: jnp.where(one[1] > other[1], a, b), one, other)

    best = better_of(both(matching), best)

    def restart(best: _Found, key: jax.Array) -> tuple[_Found, None]:
        """Reshuffle a few nodes of the best matching, climb again, keep the better one."""
        which, order, size = jax.random.split(key, 3)
        kept = jnp.sort(jax.random.permutation(which, n)[: max(2, n // 4)])
        count = jax.random.randint(size, (), 2, max(3, n // 4 + 1))
        # A rotation among the first `count` chosen nodes moves them all.
        chosen = jax.random.permutation(order, kept)
        location = jnp.arange(chosen.shape[0])
        source = jnp.where(location < count, (location + 1) % count, location)
        shaken = best[0].at[chosen].set(best[0][chosen[source]])
        return better_of(both(shaken), best), None

    if restarts:
        best, _ = jax.lax.scan(restart, best, jax.random.split(key, restarts))
    return best[0]


def _objective(graphs: Graphs, q: Order) -> Scalar:
    c, d, gains = graphs
    return jnp.sum(c * d[q][:, q]) + (0.0 if gains is None else gains[jnp.arange(len(q)), q].sum())


def _climb(move: Callable[..., jax.Array], graphs: Graphs, start: _Found, steps: int) -> _Found:
    # Moves draw nothing: after a move without gain the next would be the same.
    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        _, _, step, improved = state
        return improved & (step < steps)

    def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q, value, step, _ = state
        candidate = move(graphs, q)
        new = _objective(graphs, candidate)
        improved = new > value + _GAIN * jnp.abs(value)
        q = jnp.where(improved, candidate, q)
        return q, jnp.where(improved, new, value), step + 1, improved

    q, value = start
    q, value, _, _ = jax.lax.while_loop(
        unfinished, body, (q, value, jnp.zeros((), jnp.int32), jnp.ones((), bool))
    )
    return q, value


def _assignment(graphs: Graphs, q: Order) -> Order:
    """One conditional-gradient step of full length, by the Hungarian algorithm."""
    # A matching sends diagonal to diagonal, so that part of the objective is linear and exact;
    # leaving the diagonals in the quadratic part would tie each node to where it is.
    c, d, gains = graphs
    c_own, d_own = jnp.diag(c), jnp.diag(d)
    gradient = (0.0 if gains is None else gains) + 2 * (c - jnp.diag(c_own)) @ (
        d - jnp.diag(d_own)
    )[q]
    # For a square matrix the columns come in order, not the rows.
    rows, columns = optax.assignment.hungarian_algorithm(-(gradient + jnp.outer(c_own, d_own)))
    return q.at[rows].set(columns.astype(q.dtype))


def _exchange(graphs: Graphs, q: Order) -> Order:
    """Swap all pairs of nodes that are each other's best partner, or only the best pair."""
    (c, d, gains), n = graphs, q.shape[0]
    dq = d[q][:, q]
    product = c @ dq
    local, c_own, d_own = jnp.diag(product), jnp.diag(c), jnp.diag(dq)
    gain = product + product.T - local[:, None] - local
    # Minus the terms k = i and k = j of the sum, which a swap treats apart.
    gain -= (c_own[:, None] - c.T) * (dq.T - d_own[:, None])
    gain -= (c - c_own) * (d_own - dq)
    gain = 2 * gain + (c_own[:, None] - c_own) * (d_own - d_own[:, None])
    if gains is not None:
        moved = gains[:, q]
        gain += moved + moved.T - jnp.diag(moved)[:, None] - jnp.diag(moved)
    partner = jnp.argmax(gain, axis=1)
    nodes = jnp.arange(n)
    best_gain = gain[nodes, partner]
    mutual = (partner[partner] == nodes) & (best_gain > 0)
    together = q[jnp.where(mutual, partner, nodes)]
    i = jnp.argmax(best_gain)
    j = partner[i]
    single = q.at[i].set(q[j]).at[j].set(q[i])
    return jnp.where(_objective(graphs, together) > _objective(graphs, single), together, single)
