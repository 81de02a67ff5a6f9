"""Roots of increasing functions along a path, for all rows at once; steps keep a bracket."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# From then on every second step bisects, because Newton's may creep along one end.
_TRUSTED_STEPS = 8


class Solution(NamedTuple):
    """The end of a search: `alpha`, its divergences, and bounds proven to hold the exact answer."""

    alpha: jax.Array
    at: Any
    lower: jax.Array
    upper: jax.Array
    converged: jax.Array
    sweeps: Any


class Visit(NamedTuple):
    """At an alpha: value minus target, its error bound, a step, and bounds of the root."""

    gap: jax.Array
    error: jax.Array
    step: jax.Array
    lower: jax.Array
    upper: jax.Array
    at: Any


class _State(NamedTuple):
    alpha: jax.Array
    at: Any
    following: jax.Array
    below: jax.Array
    above: jax.Array
    lower: jax.Array
    upper: jax.Array
    done: jax.Array
    sure: jax.Array


def find_root(
    visit: Callable[[jax.Array], Visit],
    allowed: jax.Array,
    start: jax.Array,
    low: float,
    high: float,
    *,
    max_sweeps: int,
    unrolled: bool,
    doubt: Any = jnp.inf,
) -> Solution:
    """The zero of the growing gap, up to `allowed`; the bound if the zero lies beyond it.

    An end whose error exceeds `doubt` is not called converged.
    """

    def advance(state: _State, sweep: Any) -> _State:
        alpha = state.following
        seen = visit(alpha)
        below = seen.gap < 0
        at_bound = (below & (alpha >= high)) | (~below & (alpha <= low))
        # Errors are bounds: computed values are mostly a hundred times as good.
        done = (jnp.abs(seen.gap) <= allowed + 0.01 * seen.error) | at_bound
        least = jnp.where(below, jnp.maximum(alpha, state.below), state.below)
        most = jnp.where(below, state.above, jnp.minimum(alpha, state.above))
        new = jnp.clip(alpha + seen.step, low, high)
        middle = 0.5 * (jnp.maximum(least, low) + jnp.minimum(most, high))
        # An evaluated end is not an answer; an end that was not evaluated may be.
        inside = (new > least) & (new < most)
        cautious = (sweep >= _TRUSTED_STEPS) & (sweep % 2 == 0)
        new = jnp.where(inside & ~cautious, new, middle)
        done |= ~((new > least) & (new < most))
        done &= jnp.isfinite(seen.gap)

        def keep(old: jax.Array, changed: jax.Array) -> jax.Array:
            return jnp.where(state.done, old, changed)

        return _State(
            alpha=keep(state.alpha, alpha),
            at=seen.at if state.at is None else jax.tree.map(keep, state.at, seen.at),
            following=keep(state.following, jnp.where(done, alpha, new)),
            below=keep(state.below, least),
            above=keep(state.above, most),
            lower=jnp.maximum(state.lower, seen.lower),
            upper=jnp.minimum(state.upper, seen.upper),
            done=state.done | done,
            sure=keep(state.sure, seen.error <= doubt),
        )

    start = jnp.where(jnp.isfinite(start), start, 0.5 * (low + high))
    start = jnp.clip(start, low, high)
    # Ends are infinite until the search has passed the target.
    unknown = jnp.full_like(start, jnp.inf)
    ends = jnp.full_like(start, low), jnp.full_like(start, high)
    state = _State(start, None, start, -unknown, unknown, *ends, *[jnp.zeros_like(start, bool)] * 2)
    # The first evaluation fills in the values to keep.
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
    # For a root beyond the range, the nearer end is the answer.
    lower, upper = jnp.minimum(state.lower, high), jnp.maximum(state.upper, low)
    return Solution(state.alpha, state.at, lower, upper, state.done & state.sure, sweeps)
