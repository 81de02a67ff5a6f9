"""The global minimum of the paper's objective along the path, with a proof: branch and bound.

With F(a) = KL(P_a || P), R(a) = KL(P || P_a), and mean mu and variance v of h under P_a, everything
between two evaluated points is bounded by what is known at their ends::

    F' = a v,  R' = mu,  F and R and mu grow,   L = (F - f)^2 + (R - r)^2
    L'/2 = (F - f) a v + (R - r) mu
    L''/2 = (a v)^2 + mu^2 + (F - f) (v + a v') + (R - r) v
    -(mu - min h) <= v'/v <= max h - mu      for v' is the third central moment

An interval whose bound is no better than the best point seen is done with. Every other one is
split, from left to right, so that few are open at once, and the search ends with a certificate or
says that it has none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.fusion._path import Moments, Path
from logitjax.fusion._solve import Solution
from logitjax.ops import AxisName

# Intervals that are held. More are rarely open at once; the bound of one given up is remembered.
_HELD = 8
# A split leaves at least this share of an interval on either side.
_MARGIN = 0.125
_TINY = 1e-30


class Point(NamedTuple):
    """An evaluated alpha: F - f and R - r, mu, what v is at least and at most."""

    alpha: jax.Array
    forward: jax.Array
    reverse: jax.Array
    mean: jax.Array
    least: jax.Array
    most: jax.Array

    @property
    def objective(self) -> jax.Array:
        return self.forward**2 + self.reverse**2

    def slope(self, sign: int) -> jax.Array:
        """What L' times `sign` is at least, for sign 1 or -1."""
        bend = _lowest(sign * self.forward, self.alpha * self.least, self.alpha * self.most)
        return 2 * (bend + sign * self.reverse * self.mean)


class Interval(NamedTuple):
    """No alpha between two points has an objective below `bound`; `split` is where to look next."""

    left: Point
    right: Point
    bound: jax.Array
    split: jax.Array


class _State(NamedTuple):
    open: Interval
    best: Point
    given_up: jax.Array
    done: jax.Array


class _Search(NamedTuple):
    """One search: the path and the targets f and r, `[T, *batch]`."""

    path: Path
    forward: jax.Array
    reverse: jax.Array
    axis_name: AxisName | None

    def point(self, alpha: jax.Array, at: Moments, centre: jax.Array | float) -> Point:
        # Sums of squares about a centre lose the digits that centre and mean are apart.
        error = 1e-6 * (at.variance + (at.mean - centre) ** 2)
        return Point(
            alpha,
            alpha * at.mean - at.log_z - self.forward,
            at.log_z - self.reverse,
            at.mean,
            jnp.maximum(at.variance - error, 0.0),
            at.variance + error,
        )

    def advance(self, state: _State) -> _State:
        """Splits the leftmost open interval of every row: one sweep over the vocabulary."""
        intervals = state.open
        index = jnp.arange(len(intervals.bound)).reshape(-1, *[1] * self.forward.ndim)
        closed = _sufficient(intervals.bound, state.best)
        chosen = index == jnp.where(closed, jnp.inf, intervals.left.alpha).argmin(0)
        whole = _only(chosen, intervals)
        left, right, alpha = whole.left, whole.right, whole.split
        share = (alpha - left.alpha) / jnp.maximum(right.alpha - left.alpha, _TINY)
        centre = left.mean + share * (right.mean - left.mean)
        at = self.path.moments(alpha, axis_name=self.axis_name, centre=centre)
        middle = self.point(alpha, at, centre)
        halves = between(self.path, _stack(left, middle), _stack(middle, right))
        # Parts are no worse than the whole, whatever rounding says.
        halves = halves._replace(bound=jnp.maximum(halves.bound, whole.bound))
        # One takes the place of the whole, the other that of the interval with the least to gain.
        others = jnp.where(chosen, -jnp.inf, intervals.bound)
        replaced = index == others.argmax(0)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(chosen, new[0], jnp.where(replaced, new[1], old))

        given_up = jnp.minimum(state.given_up, others.max(0))
        better = (middle.objective < state.best.objective) & ~state.done
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), middle, state.best)
        return _judged(_State(jax.tree.map(put, intervals, halves), best, given_up, state.done))


def _judged(state: _State) -> _State:
    """Done where no interval, open or given up, can hold anything better."""
    bound = jnp.minimum(state.open.bound.min(0), state.given_up)
    return state._replace(done=state.done | _sufficient(bound, state.best))


def _sufficient(bound: jax.Array, best: Point) -> jax.Array:
    # Below 1e-6 the divergences themselves are rounding of float32.
    return bound >= best.objective - 1e-6 - 1e-5 * best.objective


def find_minimum(
    path: Path,
    forward: jax.Array,
    reverse: jax.Array,
    values: jax.Array,
    *,
    max_sweeps: int,
    axis_name: AxisName | None,
) -> Solution:
    """Alpha whose objective no other in the range undercuts by more than 1e-6 (relative: 1e-5).

    Beyond that the divergences are only as good as float32. `converged` is that certificate. The
    first points, `values`, have the ends of the range among them, and cost one all-reduce; with an
    axis name exactly `max_sweeps` more are made.
    """
    search = _Search(path, forward, reverse, axis_name)
    alphas, at = path.scan(values, order=2, axis_name=axis_name)
    points = search.point(alphas, at, 0.0)
    left, right = jax.tree.map(lambda x: x[:-1], points), jax.tree.map(lambda x: x[1:], points)
    intervals = between(path, left, right)
    spare = max(_HELD - len(intervals.bound), 0)
    intervals = jax.tree.map(
        lambda x: jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)), intervals
    )
    held = jnp.arange(len(intervals.bound)) < len(values) - 1
    held = held.reshape(-1, *[1] * forward.ndim)
    intervals = intervals._replace(bound=jnp.where(held, intervals.bound, jnp.inf))
    # At alpha = 0 is a maximum, never the answer, though it may be stationary.
    allowed = jnp.where(alphas > 0, points.objective, jnp.inf)
    least = jnp.arange(len(values)).reshape(-1, *[1] * forward.ndim) == allowed.argmin(0)
    best = _only(least, points)
    nothing = jnp.full_like(forward, jnp.inf)
    state = _judged(_State(intervals, best, nothing, jnp.zeros_like(forward, bool)))
    sweeps = jnp.zeros((), jnp.int32)
    if axis_name is not None:
        for _ in range(max_sweeps):
            state = search.advance(state)
        sweeps = sweeps + max_sweeps
    else:
        state, sweeps = lax.while_loop(
            lambda carry: (carry[1] < max_sweeps) & ~carry[0].done.all(),
            lambda carry: (search.advance(carry[0]), carry[1] + 1),
            (state, sweeps),
        )
    best, intervals = state.best, state.open
    # Where the exact minimum may be: beside the best point, intervals with a better bound.
    better = intervals.bound < best.objective
    lost = state.given_up < best.objective
    lower = jnp.where(better, intervals.left.alpha, jnp.inf).min(0)
    upper = jnp.where(better, intervals.right.alpha, -jnp.inf).max(0)
    return Solution(
        best.alpha,
        (best.forward + forward, best.reverse + reverse),
        jnp.where(lost, values[0], jnp.minimum(lower, best.alpha)),
        jnp.where(lost, values[-1], jnp.maximum(upper, best.alpha)),
        state.done,
        sweeps + len(values),
    )


def between(path: Path, left: Point, right: Point) -> Interval:
    """What the ends of an interval say of its inside."""
    width = right.alpha - left.alpha
    growth, decay = path.most - left.mean, right.mean - path.least
    growth, decay = jnp.maximum(growth, 0.0), jnp.maximum(decay, 0.0)
    least, most = _variances(left, right, growth, decay)
    # 1. F and R stay between their values at the ends.
    ranges = (left.forward, right.forward), (left.reverse, right.reverse)
    corner = sum(jnp.maximum(jnp.maximum(low, -high), 0.0) ** 2 for low, high in ranges)
    # 2. So do all factors of the slope: L stays above lines from both ends.
    rise = _lowest(left.forward, left.alpha * least, right.alpha * most)
    rise += _lowest(left.reverse, left.mean, right.mean)
    fall = _lowest(-right.forward, left.alpha * least, right.alpha * most)
    fall += _lowest(-right.reverse, left.mean, right.mean)
    # 3. With L'' >= -2 q, the function L - q t (width - t) is convex, and lies on its tangents.
    curvature = (
        (left.alpha * least) ** 2
        + left.mean**2
        + _lowest(left.reverse, least, most)
        + jnp.minimum(
            jnp.minimum(left.forward, 0.0) * (1 + right.alpha * growth),
            jnp.maximum(right.forward, 0.0) * jnp.minimum(1 - right.alpha * decay, 0.0),
        )
        * most
    )
    bend = 1.001 * jnp.maximum(-curvature, 0.0) * width
    starts = jnp.maximum(2 * rise, left.slope(1) - bend)
    ends = jnp.minimum(-2 * fall, bend - right.slope(-1))
    one, other = left.objective, right.objective
    meet = (other - one - ends * width) / jnp.minimum(starts - ends, -_TINY)
    lines = one + starts * jnp.clip(meet, 0.0, width)
    lines = jnp.where(starts >= 0, one, jnp.where(ends <= 0, other, lines))
    bound = jnp.maximum(corner, jnp.where(jnp.isnan(lines), 0.0, lines))
    split = _split(left, right)
    # Between neighbours there is no number.
    empty = (split <= left.alpha) | (split >= right.alpha)
    return Interval(left, right, jnp.where(empty, jnp.inf, bound), split)


def _lowest(gap: jax.Array, least: jax.Array, most: jax.Array) -> jax.Array:
    """The least of gap x for x from `least` to `most`, both from 0 up."""
    return gap * jnp.where(gap >= 0, least, most)


def _variances(left: Point, right: Point, growth: jax.Array, decay: jax.Array) -> Any:
    """What v is at least and at most between two points.

    log v neither grows faster than `growth` nor falls faster than `decay`, from either end.
    """
    beyond = growth * decay / jnp.maximum(growth + decay, _TINY) * (right.alpha - left.alpha)
    # Less what the exponential may be off by.
    share = 0.999 * jnp.exp(-beyond)
    most = jnp.where(beyond < 60, jnp.maximum(left.most, right.most) / share, jnp.inf)
    # Numbers from -x to y with mean 0 have no larger variance than x y (Bhatia and Davis).
    return jnp.minimum(left.least, right.least) * share, jnp.minimum(most, 1.001 * growth * decay)


def _split(left: Point, right: Point) -> jax.Array:
    """The minimum of the cubic through both ends if it turns in between, else the middle."""
    width = right.alpha - left.alpha
    middle = left.alpha + 0.5 * width
    start, end = left.slope(1), -right.slope(-1)
    mean = start + end - 3 * (right.objective - left.objective) / width
    root = jnp.sqrt(jnp.maximum(mean**2 - start * end, 0.0))
    cubic = right.alpha - width * (end + root - mean) / (end - start + 2 * root)
    margin = _MARGIN * width
    cubic = jnp.clip(cubic, left.alpha + margin, right.alpha - margin)
    turns = (start < 0) & (end > 0) & (cubic > left.alpha) & (cubic < right.alpha)
    return jnp.where(turns, cubic, middle)


def _only(which: jax.Array, tree: Any) -> Any:
    """Of stacked values the one that is marked; by a sum, for batches may be sharded."""
    return jax.tree.map(lambda x: jnp.where(which, x, 0.0).sum(0), tree)


def _stack(one: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.stack([x, y]), one, other)
