"""Roots along the path of what grows, for all rows at once.

Every step keeps a bracket and falls back to its middle, so that the worst row ends as surely as the
easy ones. Rows that are done stay where they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# From then on every second step takes the middle: Newton's may creep along one end of the bracket.
_TRUSTED_STEPS = 8


class Solution(NamedTuple):
    """Where a search ended: `alpha`, what its evaluation gave, a bracket of the wanted point."""

    alpha: jax.Array
    at: Any
    lower: jax.Array
    upper: jax.Array
    converged: jax.Array
    sweeps: Any


class _State(NamedTuple):
    alpha: jax.Array
    at: Any
    following: jax.Array
    lower: jax.Array
    upper: jax.Array
    done: jax.Array


def find_root(
    evaluate: Callable[[jax.Array], tuple[jax.Array, jax.Array, Any]],
    target: jax.Array,
    start: jax.Array,
    low: float,
    high: float,
    *,
    quadratic: bool,
    tolerance: float,
    max_sweeps: int,
    unrolled: bool,
) -> Solution:
    """Solves `value(alpha) = target` for a value that grows; ends at the bound if it lies beyond.

    `evaluate` gives value, slope and anything to keep. A `quadratic` value is about c alpha^2 near
    0, so Newton's method takes its root, which is nearly straight. The tolerance is relative to the
    target. `unrolled` does exactly `max_sweeps` evaluations, without a loop.
    """
    allowed = tolerance * jnp.maximum(jnp.abs(target), 1e-2)

    def advance(state: _State, sweep: Any) -> _State:
        alpha = state.following
        value, slope, at = evaluate(alpha)
        gap = value - target
        step = -gap
        if quadratic:
            root = jnp.sqrt(jnp.maximum(value, 0.0))
            step = (jnp.sqrt(target) - root) * 2 * root
        below = gap < 0
        at_bound = (below & (alpha >= high)) | (~below & (alpha <= low))
        done = (jnp.abs(gap) <= allowed) | at_bound
        lower = jnp.where(below, jnp.maximum(alpha, state.lower), state.lower)
        upper = jnp.where(below, state.upper, jnp.minimum(alpha, state.upper))
        new = jnp.clip(alpha + step / slope, low, high)
        middle = 0.5 * (jnp.maximum(lower, low) + jnp.minimum(upper, high))
        # An end that was evaluated is no answer; one that was not may be.
        inside = (new > lower) & (new < upper)
        cautious = (sweep >= _TRUSTED_STEPS) & (sweep % 2 == 0)
        new = jnp.where(inside & ~cautious, new, middle)
        done |= ~((new > lower) & (new < upper))
        done &= jnp.isfinite(gap)

        def keep(old: jax.Array, changed: jax.Array) -> jax.Array:
            return jnp.where(state.done, old, changed)

        return _State(
            alpha=keep(state.alpha, alpha),
            at=at if state.at is None else jax.tree.map(keep, state.at, at),
            following=keep(state.following, jnp.where(done, alpha, new)),
            lower=keep(state.lower, lower),
            upper=keep(state.upper, upper),
            done=state.done | done,
        )

    start = jnp.where(jnp.isfinite(start), start, 0.5 * (low + high))
    start = jnp.clip(start, low, high)
    # Ends are infinite until the search has been beyond the wanted point.
    unknown = jnp.full_like(start, jnp.inf)
    state = _State(start, None, start, -unknown, unknown, jnp.zeros_like(start, bool))
    # The first one fills in what evaluations keep.
    state, sweeps = advance(state, 0), jnp.ones((), jnp.int32)
    if unrolled:
        for sweep in range(1, max_sweeps):
            state = advance(state, sweep)
        sweeps = sweeps * max_sweeps
    else:
        state, sweeps = lax.while_loop(
            lambda carry: (carry[1] < max_sweeps) & ~carry[0].done.all(),
            lambda carry: (advance(*carry), carry[1] + 1),
            (state, sweeps),
        )
    lower, upper = jnp.maximum(state.lower, low), jnp.minimum(state.upper, high)
    return Solution(state.alpha, state.at, lower, upper, state.done, sweeps)
