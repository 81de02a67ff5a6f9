"""The best grid point for the paper's objective, and an interval proven to hold the minimum.

With F(a) = KL(P_a || P), R(a) = KL(P || P_a), and mean mu and variance v of h under P_a, everything
between two evaluated points is bounded by the values at these points::

    F' = a v,  R' = mu,  F and R and mu grow,   L = (F - f)^2 + (R - r)^2
    L'/2 = (F - f) a v + (R - r) mu
    L''/2 = (a v)^2 + mu^2 + (F - f) (v + a v') + (R - r) v
    -(mu - min h) <= v'/v <= max h - mu      for v' is the third central moment

All bounds are widened by possible rounding errors. The minimum may be where L may lie below the
best point; where L'' is positive, only where L' may vanish.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from logitjax.fusion._path import Moments, Path
from logitjax.fusion._solve import Solution
from logitjax.ops import AxisName

_TINY = 1e-30
# Squares of smaller numbers vanish.
_ROOT = 1e-18


class Point(NamedTuple):
    """An evaluated alpha: F - f, R - r and mu with their error bounds; v at least and at most."""

    alpha: jax.Array
    forward: jax.Array
    reverse: jax.Array
    mean: jax.Array
    errors: tuple[jax.Array, jax.Array, jax.Array]
    least: jax.Array
    most: jax.Array

    @classmethod
    def of(cls, at: Moments, targets: Any, errors: Any) -> "Point":
        """Subtract targets f and r, given their error bounds, `[T, *batch]`."""
        forward, reverse, mean, variance = at.errors
        return cls(
            at.alpha,
            at.forward - targets[0],
            at.reverse - targets[1],
            at.mean,
            (forward + errors[0] + _ROOT, reverse + errors[1] + _ROOT, mean),
            jnp.maximum(at.variance - variance, 0.0),
            at.variance + variance,
        )

    @property
    def objective(self) -> jax.Array:
        return self.forward**2 + self.reverse**2

    def extreme(self, sign: int) -> jax.Array:
        """Bound L from above (1) or below (-1)."""
        gaps = zip((self.forward, self.reverse), self.errors, strict=False)
        value: Any = sum(jnp.maximum(jnp.abs(gap) + sign * error, 0.0) ** 2 for gap, error in gaps)
        return value * (1 + sign * 1e-6)

    def less(self, sign: int) -> "Point":
        """Multiply gaps by `sign`, and add rounding errors to the gaps and the mean."""
        forward, reverse, mean = self.errors
        return self._replace(
            forward=sign * self.forward - forward,
            reverse=sign * self.reverse - reverse,
            mean=jnp.maximum(self.mean - mean, 0.0),
        )

    def slope(self, sign: int) -> jax.Array:
        """Bound L' times `sign` from below, for sign 1 or -1."""
        low, most = self.less(sign), self.mean + self.errors[2]
        bend = _lowest(low.forward, self.alpha * self.least, self.alpha * self.most)
        return 2 * (bend + _lowest(low.reverse, low.mean, most))


class Interval(NamedTuple):
    """True if no alpha between two points has an objective below `bound`.

    The same holds for the lines that start from the lower end with a slope of at least `starts` and
    at most `ends`; the slope grows at a rate of at least `convex`.
    """

    left: Point
    right: Point
    bound: jax.Array
    starts: jax.Array
    ends: jax.Array
    convex: jax.Array
    noise: jax.Array

    def reach(self, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The alphas of a minimum that may be below `value`; from inf to -inf if none may."""
        above = [jnp.maximum(point.extreme(-1) - value, 0.0) for point in (self.left, self.right)]
        slopes = jnp.maximum(-self.starts, _TINY), jnp.maximum(self.ends, _TINY)
        # Minus the error bound of the quotient.
        low, high = (0.999 * x / slope for x, slope in zip(above, slopes, strict=True))
        low, high = self.left.alpha + low, self.right.alpha - high
        # A growing slope vanishes no further from an end than this.
        low = jnp.maximum(low, self.right.alpha - self._zero(self.right.slope(-1)))
        high = jnp.minimum(high, self.left.alpha + self._zero(self.left.slope(1)))
        margin = 1e-6 * self.right.alpha
        some = (self.bound <= value) & (low <= high + margin)
        return jnp.where(some, low - margin, jnp.inf), jnp.where(some, high + margin, -jnp.inf)

    def _zero(self, slope: jax.Array) -> jax.Array:
        """Distance at which the slope may vanish, given its least growth from an end."""
        distance = jnp.maximum(self.noise - slope, 0.0) / jnp.maximum(0.999 * self.convex, _TINY)
        return jnp.where((self.convex > 0) & (distance >= 0), distance, jnp.inf)


def find_minimum(
    path: Path,
    targets: tuple[jax.Array, jax.Array],
    errors: tuple[jax.Array, jax.Array],
    values: jax.Array,
    *,
    axis_name: AxisName | None,
) -> Solution:
    """The best alpha of `values`, the first of equal ones; one all-reduce for them all."""
    points = Point.of(path.scan(values, axis_name=axis_name), targets, errors)
    left, right = jax.tree.map(lambda x: x[:-1], points), jax.tree.map(lambda x: x[1:], points)
    index = jnp.arange(len(values)).reshape(-1, *[1] * targets[0].ndim)
    marked = index == points.objective.argmin(0)
    # By a sum, for batches may be sharded.
    best = jax.tree.map(lambda x: jnp.where(marked, x, 0.0).sum(0), points)
    lower, upper = between(path, left, right).reach(best.extreme(1))
    return Solution(
        best.alpha,
        (best.forward + targets[0], best.reverse + targets[1]),
        jnp.clip(jnp.minimum(lower.min(0), best.alpha), values[0], values[-1]),
        jnp.clip(jnp.maximum(upper.max(0), best.alpha), values[0], values[-1]),
        jnp.isfinite(best.objective),
        len(values),
    )


def between(path: Path, left: Point, right: Point) -> Interval:
    """Bound the inside of an interval by its ends."""
    width = right.alpha - left.alpha
    growth = jnp.maximum(path.most - left.less(1).mean, 0.0)
    decay = jnp.maximum(right.mean + right.errors[2] - path.least, 0.0)
    least, most = _variances(left, right, growth, decay)
    # Lower bounds of F - f, R - r and mu at the left end, and upper bounds at the right.
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
    square = (left.alpha * least) ** 2 + low.mean**2
    others = _lowest(low.reverse, least, most)
    others += most * jnp.minimum(
        jnp.minimum(low.forward, 0.0) * (1 + right.alpha * growth),
        jnp.maximum(-high.forward, 0.0) * jnp.minimum(1 - right.alpha * decay, 0.0),
    )
    curvature = square + others
    bend = 1.001 * jnp.maximum(-curvature, 0.0) * width
    starts = jnp.maximum(2 * rise, left.slope(1) - bend)
    ends = jnp.minimum(-2 * fall, bend - right.slope(-1))
    one, other = left.extreme(-1), right.extreme(-1)
    # Slopes are sums of terms of both signs, with the rounding of the larger term.
    noise = 1e-6 * (jnp.abs(bend) + 4 * right.alpha * most * _gaps(left, right, 0))
    noise += 4e-6 * mean * _gaps(left, right, 1) + _ROOT**2
    starts, ends = starts - noise, ends + noise
    meet = (other - one - ends * width) / jnp.minimum(starts - ends, -_TINY)
    lines = one + starts * jnp.clip(meet, 0.0, width)
    lines -= 1e-6 * (one + other + jnp.abs(starts) * width)
    lines = jnp.where(starts >= 0, one, jnp.where(ends <= 0, other, lines))
    # Infinite errors exclude nothing.
    bound = jnp.maximum(corner, jnp.where(jnp.isnan(lines), 0.0, lines))
    starts, ends = jnp.nan_to_num(starts, nan=-jnp.inf), jnp.nan_to_num(ends, nan=jnp.inf)
    convex = 2 * curvature - 1e-5 * (square + jnp.abs(others))
    return Interval(left, right, bound, starts, ends, jnp.nan_to_num(convex), noise)


def _gaps(left: Point, right: Point, which: int) -> jax.Array:
    gaps = (jnp.abs((x.forward, x.reverse)[which]) + x.errors[which] for x in (left, right))
    return jnp.maximum(*gaps)


def _lowest(gap: jax.Array, least: jax.Array, most: jax.Array) -> jax.Array:
    """The least of gap x for x from `least` to `most`, both from 0 up."""
    return gap * jnp.where(gap >= 0, least, most)


def _variances(left: Point, right: Point, growth: jax.Array, decay: jax.Array) -> Any:
    """Bound v between two points from below and above."""
    # log v neither grows faster than `growth` nor falls faster than `decay`, from either end.
    beyond = growth * decay / jnp.maximum(growth + decay, _TINY) * (right.alpha - left.alpha)
    # Minus the error bound of the exponential.
    share = 0.999 * jnp.exp(-beyond)
    most = jnp.where(beyond < 60, jnp.maximum(left.most, right.most) / share, jnp.inf)
    # Numbers from -x to y with mean 0 have no larger variance than x y (Bhatia and Davis).
    return jnp.minimum(left.least, right.least) * share, jnp.minimum(most, 1.001 * growth * decay)
