"""Several alphas at once: damped Newton steps, one sweep over the vocabulary each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.fusion._path import Path
from logitjax.fusion._solve import Solution
from logitjax.ops import AxisName

_DAMPING, _LEAST_DAMPING, _LARGEST_DAMPING = 1e-3, 1e-6, 1e6


class _Visit(NamedTuple):
    """A point in one sweep: value minus target, its slopes, and whether to stay."""

    gap: jax.Array
    slopes: jax.Array
    done: jax.Array
    means: jax.Array
    at: tuple[jax.Array, jax.Array]


def least_step(
    path: Path,
    target: jax.Array,
    start: jax.Array,
    bounds: tuple[float, float],
    *,
    max_sweeps: int,
    tolerance: float,
    axis_name: AxisName | None,
) -> Solution:
    """Alphas whose two divergences sum to the target: shortest steps from `start` choose which."""
    allowed = tolerance * jnp.maximum(target, 1e-2)

    def visit(alphas: jax.Array, centre: jax.Array | None) -> _Visit:
        log_z, means, covariance = path.joint_moments(alphas, axis_name=axis_name, centre=centre)
        moved = (alphas * means).sum(0) - log_z
        gap, slopes = moved + log_z - target, means + (covariance * alphas[None]).sum(1)
        # A step excludes the alphas that it would push out of the box.
        downhill = -slopes * gap
        stuck = ((alphas <= bounds[0]) & (downhill <= 0)) | ((alphas >= bounds[1]) & (downhill > 0))
        slopes = jnp.where(stuck, 0.0, slopes)
        square = (slopes**2).sum(0)
        # The second is the decrease that the linear model promises, reduced.
        done = (jnp.abs(gap) <= allowed) | (square * gap**2 <= 1e-9 * square)
        return _Visit(gap, slopes, done, means, (moved, log_z))

    def step(seen: _Visit, damping: jax.Array) -> jax.Array:
        return -seen.slopes * (seen.gap / ((1 + damping) * (seen.slopes**2).sum(0) + 1e-12))

    return _damped(visit, step, start, bounds, max_sweeps, unrolled=axis_name is not None)


def _damped(
    visit: Callable[[jax.Array, jax.Array | None], _Visit],
    step: Callable[[_Visit, jax.Array], jax.Array],
    start: jax.Array,
    bounds: tuple[float, float],
    max_sweeps: int,
    *,
    unrolled: bool,
) -> Solution:
    start = jnp.clip(jnp.where(jnp.isfinite(start), start, bounds[0]), *bounds)
    seen = visit(start, None)
    damping = jnp.full_like(seen.gap, _DAMPING)

    def advance(carry: Any) -> Any:
        alphas, seen, damping = carry
        trial = jnp.clip(alphas + step(seen, damping), *bounds)
        trial = jnp.where(jnp.isfinite(trial), trial, alphas)
        new = visit(trial, seen.means)
        # Near the end, differences of merits are rounding.
        better = new.gap**2 <= seen.gap**2 * (1 + 1e-6) + 1e-6
        accepted = (better | new.done) & ~seen.done

        def choose(old: jax.Array, changed: jax.Array) -> jax.Array:
            return jnp.where(accepted, changed, old)

        factor = jnp.where(accepted, 0.2, 10.0)
        damping = jnp.clip(damping * factor, _LEAST_DAMPING, _LARGEST_DAMPING)
        return choose(alphas, trial), jax.tree.map(choose, seen, new), damping

    carry = (start, seen, damping)
    sweeps = jnp.ones((), jnp.int32)
    if unrolled:
        for _ in range(max_sweeps - 1):
            carry = advance(carry)
        sweeps = sweeps * max_sweeps
    else:
        carry, sweeps = lax.while_loop(
            lambda loop: (loop[1] < max_sweeps) & ~loop[0][1].done.all(),
            lambda loop: (advance(loop[0]), loop[1] + 1),
            (carry, sweeps),
        )
    alphas, seen, _ = carry
    converged = jnp.broadcast_to(seen.done, alphas.shape)
    # One equation does not determine any single one of several alphas.
    lower, upper = (jnp.full_like(alphas, bound) for bound in bounds)
    return Solution(alphas, seen.at, lower, upper, converged, sweeps)
