"""The global minimum of the paper's objective along the path, with a proof: branch and bound.

With F(a) = KL(P_a || P), R(a) = KL(P || P_a), and mean mu and variance v of h under P_a, everything
between two evaluated points is bounded by what is known at their ends::

    F' = a v,  R' = mu,  F and R and mu grow,   L = (F - f)^2 + (R - r)^2
    L'/2 = (F - f) a v + (R - r) mu
    L''/2 = (a v)^2 + mu^2 + (F - f) (v + a v') + (R - r) v
    -(mu - min h) <= v'/v <= max h - mu      for v' is the third central moment

All of it less what rounding may have added. An interval whose bound is no better than the best
point seen is done with. Every other one is split, from left to right, so that few are open at once,
and the search ends with a certificate or says that it has none. What lies below the best point at
all, from the first points on, is where the exact minimum may be.
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
# Squares of what is smaller vanish.
_ROOT = 1e-18


class Point(NamedTuple):
    """An evaluated alpha: F - f, R - r and mu, how far they may be off; v at least and at most."""

    alpha: jax.Array
    forward: jax.Array
    reverse: jax.Array
    mean: jax.Array
    errors: tuple[jax.Array, jax.Array, jax.Array]
    least: jax.Array
    most: jax.Array

    @property
    def objective(self) -> jax.Array:
        return self.forward**2 + self.reverse**2

    def extreme(self, sign: int) -> jax.Array:
        """What L is at most (1) or at least (-1)."""
        gaps = zip((self.forward, self.reverse), self.errors, strict=False)
        value: Any = sum(jnp.maximum(jnp.abs(gap) + sign * error, 0.0) ** 2 for gap, error in gaps)
        return value * (1 + sign * 1e-6)

    def less(self, sign: int) -> "Point":
        """With gaps times `sign` and a mean as rounding may have made them too large."""
        forward, reverse, mean = self.errors
        return self._replace(
            forward=sign * self.forward - forward,
            reverse=sign * self.reverse - reverse,
            mean=jnp.maximum(self.mean - mean, 0.0),
        )

    def slope(self, sign: int) -> jax.Array:
        """What L' times `sign` is at least, for sign 1 or -1."""
        low, most = self.less(sign), self.mean + self.errors[2]
        bend = _lowest(low.forward, self.alpha * self.least, self.alpha * self.most)
        return 2 * (bend + _lowest(low.reverse, low.mean, most))


class Interval(NamedTuple):
    """No alpha between two points has an objective below `bound`; `split` is where to look next.

    Nor below the lines that start from the least of the ends with a slope of at least `starts` and
    at most `ends`.
    """

    left: Point
    right: Point
    bound: jax.Array
    split: jax.Array
    starts: jax.Array
    ends: jax.Array

    def reach(self, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The alphas whose objective may be below `value`; from inf to -inf where none may."""
        above = [jnp.maximum(point.extreme(-1) - value, 0.0) for point in (self.left, self.right)]
        slopes = jnp.maximum(-self.starts, _TINY), jnp.maximum(self.ends, _TINY)
        # Less than what the quotient may be off by.
        low, high = (0.999 * x / slope for x, slope in zip(above, slopes, strict=True))
        low, high = self.left.alpha + low, self.right.alpha - high
        some = (self.bound <= value) & (low <= high)
        return jnp.where(some, low, jnp.inf), jnp.where(some, high, -jnp.inf)


class _State(NamedTuple):
    open: Interval
    best: Point
    given_up: jax.Array
    lower: jax.Array
    upper: jax.Array
    done: jax.Array


class _Search(NamedTuple):
    """One search: the path, and the targets f and r with what they may be off by, `[T, *batch]`."""

    path: Path
    forward: jax.Array
    reverse: jax.Array
    errors: tuple[jax.Array, jax.Array]
    axis_name: AxisName | None

    def point(self, at: Moments) -> Point:
        forward, reverse, mean, variance = at.errors
        return Point(
            at.alpha,
            at.forward - self.forward,
            at.reverse - self.reverse,
            at.mean,
            (forward + self.errors[0] + _ROOT, reverse + self.errors[1] + _ROOT, mean),
            jnp.maximum(at.variance - variance, 0.0),
            at.variance + variance,
        )

    def sufficient(self, bound: jax.Array, best: Point) -> jax.Array:
        """Whether nothing better than a share of the objective and rounding is to be gained."""
        scale = self.forward**2 + self.reverse**2
        rounding = best.extreme(1) - best.extreme(-1)
        return bound >= best.objective * (1 - 1e-5) - 1e-8 * scale - 2 * rounding

    def advance(self, state: _State) -> _State:
        """Splits the leftmost open interval of every row: one sweep over the vocabulary."""
        intervals = state.open
        index = jnp.arange(len(intervals.bound)).reshape(-1, *[1] * self.forward.ndim)
        chosen = index == jnp.where(self.unsettled(state), intervals.left.alpha, jnp.inf).argmin(0)
        whole = _only(chosen, intervals)
        left, right, alpha = whole.left, whole.right, whole.split
        share = (alpha - left.alpha) / jnp.maximum(right.alpha - left.alpha, _TINY)
        centre = left.mean + share * (right.mean - left.mean)
        at = self.path.moments(alpha, axis_name=self.axis_name, centre=centre)
        middle = self.point(at)
        halves = between(self.path, _stack(left, middle), _stack(middle, right))
        # Parts are no worse than the whole, whatever rounding says.
        halves = halves._replace(bound=jnp.maximum(halves.bound, whole.bound))
        # One takes the place of the whole, the other that of the interval with the least to gain.
        others = jnp.where(chosen, -jnp.inf, intervals.bound)
        replaced = index == others.argmax(0)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(chosen, new[0], jnp.where(replaced, new[1], old))

        given_up = jnp.minimum(state.given_up, others.max(0))
        # Its place is remembered where the minimum may be in it.
        lower, upper = _only(replaced, intervals).reach(state.best.extreme(1))
        lower, upper = jnp.minimum(state.lower, lower), jnp.maximum(state.upper, upper)
        better = (middle.objective < state.best.objective) & ~state.done
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), middle, state.best)
        intervals = jax.tree.map(put, intervals, halves)
        return self.judged(_State(intervals, best, given_up, lower, upper, state.done))

    def judged(self, state: _State) -> _State:
        """Done where no interval, open or given up, can hold anything better."""
        done = ~self.unsettled(state).any(0) & self.sufficient(state.given_up, state.best)
        return state._replace(done=state.done | done)

    def unsettled(self, state: _State) -> jax.Array:
        """Intervals that may hold anything better, or into which a step from the best one leads."""
        best, intervals = state.best, state.open
        variance = (best.least + best.most) / 2
        slopes = best.alpha * variance, best.mean
        slope = best.forward * slopes[0] + best.reverse * slopes[1]
        # What Gauss and Newton's step promises: bounds of rounding alone would end far from it.
        gain = slope**2 / jnp.maximum(slopes[0] ** 2 + slopes[1] ** 2, _TINY)
        scale = self.forward**2 + self.reverse**2
        steep = gain > 1e-7 * best.objective + 1e-11 * scale
        downhill = jnp.where(slope < 0, intervals.left.alpha, intervals.right.alpha) == best.alpha
        steep &= downhill & (intervals.bound < jnp.inf)
        return ~self.sufficient(intervals.bound, best) | steep


def find_minimum(
    path: Path,
    targets: tuple[jax.Array, jax.Array],
    errors: tuple[jax.Array, jax.Array],
    values: jax.Array,
    *,
    max_sweeps: int,
    axis_name: AxisName | None,
) -> Solution:
    """Alpha whose objective no other in the range undercuts by more than a share of 1e-5.

    Or of 1e-8 of the targets' squares, or by what rounding makes of it. `converged` is that
    certificate. The first points, `values`, have the ends of the range among them, and cost one
    all-reduce; with an axis name exactly `max_sweeps` more are made. Without any the answer is the
    best of the values.
    """
    forward, reverse = targets
    search = _Search(path, forward, reverse, errors, axis_name)
    points = search.point(path.scan(values, axis_name=axis_name))
    left, right = jax.tree.map(lambda x: x[:-1], points), jax.tree.map(lambda x: x[1:], points)
    intervals = between(path, left, right)
    spare = max(_HELD - len(intervals.bound), 0)
    intervals = jax.tree.map(
        lambda x: jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)), intervals
    )
    held = jnp.arange(len(intervals.bound)) < len(values) - 1
    held = held.reshape(-1, *[1] * forward.ndim)
    intervals = intervals._replace(bound=jnp.where(held, intervals.bound, jnp.inf))
    # At alpha = 0 is a maximum, and stationary: not the answer of a search that may go on.
    allowed = jnp.where((points.alpha > 0) | (max_sweeps == 0), points.objective, jnp.inf)
    least = jnp.arange(len(values)).reshape(-1, *[1] * forward.ndim) == allowed.argmin(0)
    nothing = jnp.full_like(forward, jnp.inf)
    unjudged = jnp.zeros_like(forward, bool)
    best = _only(least, points)
    state = search.judged(_State(intervals, best, nothing, nothing, -nothing, unjudged))
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
    best = state.best
    lower, upper = state.open.reach(best.extreme(1))
    lower, upper = jnp.minimum(state.lower, lower.min(0)), jnp.maximum(state.upper, upper.max(0))
    # Between two neighbours in float32 there are other numbers.
    lower, upper = jnp.minimum(lower, best.alpha) * (1 - 1e-6), jnp.maximum(upper, best.alpha)
    return Solution(
        best.alpha,
        (best.forward + forward, best.reverse + reverse),
        jnp.maximum(lower, values[0]),
        jnp.minimum(upper * (1 + 1e-6), values[-1]),
        state.done if max_sweeps else jnp.isfinite(best.objective),
        sweeps + len(values),
    )


def between(path: Path, left: Point, right: Point) -> Interval:
    """What the ends of an interval say of its inside."""
    width = right.alpha - left.alpha
    growth = jnp.maximum(path.most - left.less(1).mean, 0.0)
    decay = jnp.maximum(right.mean + right.errors[2] - path.least, 0.0)
    least, most = _variances(left, right, growth, decay)
    # What F - f, R - r and mu are at least at the left end, and at most at the right.
    low, high = left.less(1), right.less(-1)
    mean = right.mean + right.errors[2]
    # 1. F and R stay between their values at the ends.
    ranges = (low.forward, high.forward), (low.reverse, high.reverse)
    corner = sum(jnp.maximum(jnp.maximum(*pair), 0.0) ** 2 for pair in ranges) * (1 - 1e-6)
    # 2. So do all factors of the slope: L stays above lines from both ends.
    rise = _lowest(low.forward, left.alpha * least, right.alpha * most)
    rise += _lowest(low.reverse, low.mean, mean)
    fall = _lowest(high.forward, left.alpha * least, right.alpha * most)
    fall += _lowest(high.reverse, low.mean, mean)
    # 3. With L'' >= -2 q, the function L - q t (width - t) is convex, and lies on its tangents.
    curvature = (
        (left.alpha * least) ** 2
        + low.mean**2
        + _lowest(low.reverse, least, most)
        + jnp.minimum(
            jnp.minimum(low.forward, 0.0) * (1 + right.alpha * growth),
            jnp.maximum(-high.forward, 0.0) * jnp.minimum(1 - right.alpha * decay, 0.0),
        )
        * most
    )
    bend = 1.001 * jnp.maximum(-curvature, 0.0) * width
    starts = jnp.maximum(2 * rise, left.slope(1) - bend)
    ends = jnp.minimum(-2 * fall, bend - right.slope(-1))
    one, other = left.extreme(-1), right.extreme(-1)
    # Slopes are sums of terms of both signs, with the rounding of the larger.
    noise = 1e-6 * (jnp.abs(bend) + 4 * right.alpha * most * _gaps(left, right, 0))
    noise += 4e-6 * mean * _gaps(left, right, 1) + _ROOT**2
    starts, ends = starts - noise, ends + noise
    meet = (other - one - ends * width) / jnp.minimum(starts - ends, -_TINY)
    lines = one + starts * jnp.clip(meet, 0.0, width)
    lines -= 1e-6 * (one + other + jnp.abs(starts) * width)
    lines = jnp.where(starts >= 0, one, jnp.where(ends <= 0, other, lines))
    # Where an error is infinite nothing is known.
    bound = jnp.maximum(corner, jnp.where(jnp.isnan(lines), 0.0, lines))
    starts, ends = jnp.nan_to_num(starts, nan=-jnp.inf), jnp.nan_to_num(ends, nan=jnp.inf)
    split = _split(left, right)
    # Between neighbours there is no number.
    empty = (split <= left.alpha) | (split >= right.alpha)
    return Interval(left, right, jnp.where(empty, jnp.inf, bound), split, starts, ends)


def _gaps(left: Point, right: Point, which: int) -> jax.Array:
    return jnp.maximum(
        *(
            jnp.abs((point.forward, point.reverse)[which]) + point.errors[which]
            for point in (left, right)
        )
    )


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
