"""Scalar searches along the path, for all rows at once: roots of what grows, minima in brackets.

Every step keeps a bracket and falls back to its middle, so that the worst row ends as surely as the
easy ones. Rows that are done stay where they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.fusion._path import Divergences


class Solution(NamedTuple):
    """Where a search ended.

    `alpha` was evaluated, `at` is what its evaluation gave beside the value; the wanted point
    lies between `lower` and `upper`.
    """

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

    Args:
        evaluate: alpha to (value, slope, anything to keep).
        target: of each row.
        start: first alpha.
        low: least alpha.
        high: largest alpha.
        quadratic: the value is about c alpha^2 near 0, so Newton's method takes its root, which is
            nearly straight.
        tolerance: allowed `|value - target|`, relative to the target where that is below 1.
        max_sweeps: evaluations at most.
        unrolled: do exactly so many, without a loop.
    """
    allowed = tolerance * jnp.clip(jnp.abs(target), 1e-2, 1.0)

    def advance(state: _State) -> _State:
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
        return _advanced(state, alpha, at, below, done, alpha + step / slope, low, high)

    return _run(advance, start, low, high, max_sweeps=max_sweeps, unrolled=unrolled)


def find_minimum(
    evaluate: Callable[[jax.Array], Divergences],
    start: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    low: float,
    high: float,
    *,
    tolerance: float,
    max_sweeps: int,
    unrolled: bool,
) -> Solution:
    """A minimum of the objective between two points that lie higher: Newton's method on its slope.

    Args:
        evaluate: alpha to `Divergences`.
        start: first alpha, between the two.
        lower: the one.
        upper: the other.
        low: least alpha; the minimum may lie there.
        high: largest alpha; likewise.
        tolerance: done when the quadratic model promises less than this much improvement.
        max_sweeps: evaluations at most.
        unrolled: do exactly so many, without a loop.
    """

    def advance(state: _State) -> _State:
        alpha = state.following
        at = evaluate(alpha)
        falls = at.slope < 0
        at_bound = (falls & (alpha >= high)) | (~falls & (alpha <= low))
        # A slope that leads out of the bracket leads over a hill, to another minimum.
        falls &= (alpha < upper) | (alpha >= high)
        falls |= (alpha <= lower) & (alpha > low)
        convex = at.curvature > 0
        step = -at.slope / jnp.where(convex, at.curvature, jnp.nan)
        # Below what float32 can tell from noise there is nothing to find.
        narrow = state.upper - state.lower <= 1e-6 * (1 + alpha)
        done = at_bound | narrow | (convex & (0.5 * jnp.abs(at.slope * step) <= tolerance))
        return _advanced(state, alpha, at, falls, done, alpha + step, lower, upper)

    return _run(advance, start, lower, upper, max_sweeps=max_sweeps, unrolled=unrolled)


def _run(
    advance: Callable[[_State], _State],
    start: jax.Array,
    low: Any,
    high: Any,
    *,
    max_sweeps: int,
    unrolled: bool,
) -> Solution:
    middle = 0.5 * (jnp.asarray(low) + high)
    start = jnp.clip(jnp.where(jnp.isfinite(start), start, middle), low, high)
    # Ends are infinite until the search has been beyond the wanted point.
    unknown = jnp.full_like(start, jnp.inf)
    state = _State(start, None, start, -unknown, unknown, jnp.zeros_like(start, bool))
    # The first one fills in what evaluations keep.
    state, sweeps = advance(state), jnp.ones((), jnp.int32)
    if unrolled:
        for _ in range(max_sweeps - 1):
            state = advance(state)
        sweeps = sweeps * max_sweeps
    else:
        state, sweeps = lax.while_loop(
            lambda carry: (carry[1] < max_sweeps) & ~carry[0].done.all(),
            lambda carry: (advance(carry[0]), carry[1] + 1),
            (state, sweeps),
        )
    lower, upper = jnp.maximum(state.lower, low), jnp.minimum(state.upper, high)
    return Solution(state.alpha, state.at, lower, upper, state.done, sweeps)


def _advanced(
    state: _State,
    alpha: jax.Array,
    at: Any,
    rises: jax.Array,
    done: jax.Array,
    proposed: jax.Array,
    low: Any,
    high: Any,
) -> _State:
    """The next state: what is wanted lies above alpha where `rises`, else below."""
    lower = jnp.where(rises, jnp.maximum(alpha, state.lower), state.lower)
    upper = jnp.where(rises, state.upper, jnp.minimum(alpha, state.upper))
    new = jnp.clip(proposed, low, high)
    # An end that was evaluated is no answer; one that was not may be.
    inside = (new > lower) & (new < upper)
    middle = 0.5 * (jnp.maximum(lower, low) + jnp.minimum(upper, high))
    new = jnp.where(inside, new, middle)

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
