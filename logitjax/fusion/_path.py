"""The path from one distribution along a direction, and its divergences in closed form.

With P the large model's distribution, d the difference of an expert's and a base's logits and
h = d - E_P[d], the fused distributions P_a ~ P exp(a h) are an exponential family. All that fusion
asks of them are cumulants: one sweep over the vocabulary, no softmax, no logarithm per entry.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from logitjax.fusion._inputs import Inputs, pmax, read_inputs
from logitjax.ops import Array, AxisName, finite_or_zero, psum

# exp of this neither overflows in float32 when summed over a vocabulary, nor does its inverse
# vanish.
_LARGEST_EXPONENT = 60.0
# Sums over parts of the vocabulary run on several cores of a CPU, and round less.
_PARTS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Cumulants of h under P_a: `log_z = log E_P[exp(a h)]` and its first derivatives."""

    log_z: Any
    mean: Any
    variance: Any = None
    third: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
    """P and the directions, one for each expert.

    Attributes:
        log_p: `[*batch, vocab]`, -inf where the vocabulary does not exist; padded to whole parts.
        directions: `[T, *batch, vocab]`, h, centred under P; likewise.
        peak: `[T, *batch]`, the maximum of `log_p + high * h`.
        variance: `[T, *batch]`, of h under P.
        gain: `[T, *batch]`, E_P[log expert/base].
        target_forward: `[T, *batch]`, KL(expert || base).
        target_reverse: `[T, *batch]`, KL(base || expert).
        high: the largest alpha, static.
    """

    log_p: Any
    directions: Any
    peak: Any
    variance: Any
    gain: Any
    target_forward: Any
    target_reverse: Any
    high: float = dataclasses.field(metadata={"static": True})

    def __len__(self) -> int:
        return self.directions.shape[0]

    def moments(self, alpha: jax.Array, *, order: int, axis_name: AxisName | None) -> Moments:
        """Cumulants at `alpha` `[T, *batch]`, each expert alone; one all-reduce."""
        return self._cumulants(psum(self._sums(alpha, order), axis_name), alpha)

    def scan(self, values: jax.Array, *, axis_name: AxisName | None) -> tuple[Any, Moments]:
        """`values` and the cumulants at each, `[num, T, *batch]`; one all-reduce for them all.

        One value after another: nothing of the size of the vocabulary is held for each.
        """
        shape = self.variance.shape
        sums = lax.map(lambda value: self._sums(jnp.full(shape, value), 1), values)
        alpha = jnp.broadcast_to(values.reshape(-1, *[1] * len(shape)), (len(values), *shape))
        return alpha, self._cumulants(jnp.moveaxis(psum(sums, axis_name), 1, 0), alpha)

    def _offset(self, alpha: jax.Array) -> jax.Array:
        # max(log_p + a h) is convex in a and at most 0 at a = 0, so this bounds it: no sweep for
        # a maximum is needed. log_z is at least 0, so that subtracting less keeps it in range.
        bound = jnp.maximum(self.peak, 0.0) * (alpha / self.high)
        return jnp.maximum(bound - _LARGEST_EXPONENT, 0.0)

    def _sums(self, alpha: jax.Array, order: int) -> jax.Array:
        h, offset = self.directions, self._offset(alpha)
        weight = jnp.exp(self.log_p + alpha[..., None] * h - offset[..., None])
        sums = [_total(weight)]
        for _ in range(order):
            weight = weight * h
            sums.append(_total(weight))
        return jnp.stack(sums)

    def _cumulants(self, sums: jax.Array, alpha: jax.Array) -> Moments:
        total, *powers = sums
        raw: list[Any] = [power / total for power in powers]
        cumulants = raw[:1]
        if len(raw) > 1:
            cumulants.append(raw[1] - raw[0] ** 2)
        if len(raw) > 2:
            cumulants.append(raw[2] - 3 * raw[0] * raw[1] + 2 * raw[0] ** 3)
        return Moments(jnp.log(total) + self._offset(alpha), *cumulants)

    def joint_moments(
        self, alphas: jax.Array, *, axis_name: AxisName | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """log_z, E[h_t] and Cov[h_s, h_t] with all experts at once; two all-reduces."""
        h = self.directions
        x = self.log_p + (alphas[..., None] * h).sum(0)
        offset = finite_or_zero(pmax(x.max(-1), axis_name))
        weight = jnp.exp(x - offset[..., None])
        count = len(h)
        sums = [_total(weight)]
        sums += [_total(weight * h[t]) for t in range(count)]
        pairs = [(s, t) for s in range(count) for t in range(s + 1)]
        sums += [_total(weight * h[s] * h[t]) for s, t in pairs]
        total, *rest = psum(jnp.stack(sums), axis_name)
        means = [value / total for value in rest[:count]]
        covariance: dict[tuple[int, int], jax.Array] = {}
        for (s, t), value in zip(pairs, rest[count:], strict=True):
            covariance[s, t] = covariance[t, s] = value / total - means[s] * means[t]
        rows = [jnp.stack([covariance[s, t] for t in range(count)]) for s in range(count)]
        return jnp.log(total) + offset, jnp.stack(means), jnp.stack(rows)


def _total(values: jax.Array) -> jax.Array:
    vocab = values.shape[-1]
    if vocab < 128 * _PARTS:
        return values.sum(-1)
    sums = values.reshape(*values.shape[:-1], _PARTS, vocab // _PARTS).sum(-1)
    # Else the compiler makes one sum of the two, and loses two digits over a vocabulary of 50,000.
    return lax.optimization_barrier(sums).sum(-1)


def _padded(inputs: Inputs) -> Inputs:
    """With entries that do not exist, up to whole parts of the vocabulary."""
    vocab = inputs.large.shape[-1]
    extra = -vocab % _PARTS if vocab >= 128 * _PARTS else 0
    if not extra:
        return inputs
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)]), inputs)


def make_path(inputs: Inputs, high: float, axis_name: AxisName | None) -> Path:
    """Normalises, centres, and finds what the experts differ from their bases by.

    Two all-reduces, whatever the number of experts.
    """
    inputs = _padded(inputs)
    large, exists = inputs.large, inputs.exists
    experts, bases = inputs.experts, inputs.bases
    d = inputs.differences
    count = d.shape[0]

    def highest(values: jax.Array) -> jax.Array:
        return jnp.where(exists, values, -jnp.inf).max(-1)

    maxima = [highest(large)[None], highest(experts), highest(bases), highest(large + high * d)]
    maxima = finite_or_zero(pmax(jnp.concatenate(maxima), axis_name))
    top, top_expert = maxima[0], maxima[1 : 1 + count]
    top_base, top_fused = maxima[1 + count : -count], maxima[-count:]
    # Raw logits may carry any constant, which would cost digits of everything below.
    shift = top_expert - top_base
    d = jnp.where(exists, d - shift[..., None], 0.0)

    def weights(logits: jax.Array, peak: jax.Array) -> jax.Array:
        return jnp.exp(jnp.where(exists, logits - peak[..., None], -jnp.inf))

    p, q, r = weights(large, top), weights(experts, top_expert), weights(bases, top_base)
    sums = [_total(p)[None], _total(q), _total(r)]
    sums += [_total(values * d) for values in (p, q, r)] + [_total(p * d * d)]
    sums = psum(jnp.concatenate(sums), axis_name)
    cuts = [1, 1 + count, 1 + count + len(bases)]
    cuts += [cuts[-1] + count, cuts[-1] + 2 * count, cuts[-1] + 3 * count]
    z_p, z_q, z_r, d_p, d_q, d_r, d_squared = jnp.split(sums, cuts)
    mean_p, mean_q, mean_r = d_p / z_p, d_q / z_q, d_r / z_r
    ratio = jnp.log(z_q) - jnp.log(z_r)
    log_z = top + jnp.log(z_p[0])
    return Path(
        log_p=jnp.where(exists, large - log_z[..., None], -jnp.inf),
        directions=jnp.where(exists, d - mean_p[..., None], 0.0),
        peak=top_fused - log_z - high * (mean_p + shift),
        variance=jnp.maximum(d_squared / z_p - mean_p**2, 0.0),
        gain=mean_p - ratio,
        target_forward=jnp.maximum(mean_q - ratio, 0.0),
        target_reverse=jnp.maximum(ratio - mean_r, 0.0),
        high=high,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Divergences:
    """The two divergences along the path and the objective, each with its derivatives in alpha.

    Attributes:
        forward: KL(P_a || P), `F`.
        forward_slope: F'.
        forward_curvature: F''.
        reverse: KL(P || P_a), `R`.
        reverse_slope: R'.
        reverse_curvature: R''.
        target_forward: KL(expert || base).
        target_reverse: KL(base || expert).
        objective: (F - target_forward)^2 + (R - target_reverse)^2.
        slope: its derivative.
        curvature: its second derivative.
    """

    forward: Any
    forward_slope: Any
    forward_curvature: Any
    reverse: Any
    reverse_slope: Any
    reverse_curvature: Any
    target_forward: Any
    target_reverse: Any
    objective: Any
    slope: Any
    curvature: Any


def divergences_at(
    moments: Moments, alpha: jax.Array, target_forward: jax.Array, target_reverse: jax.Array
) -> Divergences:
    """The closed forms, from cumulants of a centred direction."""
    mean, variance, third = moments.mean, moments.variance, moments.third
    forward, reverse = alpha * mean - moments.log_z, moments.log_z
    gap, back = forward - target_forward, reverse - target_reverse
    forward_slope, reverse_slope = alpha * variance, mean
    forward_curvature = variance + alpha * third
    return Divergences(
        forward=forward,
        forward_slope=forward_slope,
        forward_curvature=forward_curvature,
        reverse=reverse,
        reverse_slope=reverse_slope,
        reverse_curvature=variance,
        target_forward=target_forward,
        target_reverse=target_reverse,
        objective=gap**2 + back**2,
        slope=2 * (gap * forward_slope + back * reverse_slope),
        curvature=2
        * (forward_slope**2 + gap * forward_curvature + reverse_slope**2 + back * variance),
    )


def fusion_divergences(
    logits_large: Float[Array, "*batch vocab"],
    logits_expert: Float[Array, "*batch vocab"],
    logits_base: Float[Array, "*batch vocab"],
    alpha: Float[Array, "*batch"],
    *,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Divergences:
    """How far the fused distribution is from the large model's, beside expert and base.

    With d the difference of the expert's and the base's logits, A(a) = log E_P[exp(a d)], and mu,
    v, k its first three derivatives::

        F(a) = KL(P_a || P) = a mu - A          F' = a v         F'' = v + a k
        R(a) = KL(P || P_a) = A - a mu(0)       R' = mu - mu(0)  R'' = v
        L = (F - KL(expert || base))^2 + (R - KL(base || expert))^2

    F and R grow with a >= 0; L has a maximum at 0 and may have several minima.

    Args:
        logits_large: `[*batch, vocab]`.
        logits_expert: the same shape.
        logits_base: the same shape.
        alpha: `[*batch]`, not negative.
        vocab_where: boolean, broadcastable to the logits: True for the entries that exist.
        axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis: that axis.

    Returns:
        `Divergences` of `[*batch]` float32 arrays.

    Raises:
        ValueError: the shapes differ.

    >>> large, expert, base = jnp.array([0.0, 1.0, 2.0]), jnp.array([2.0, 0.0, 1.0]), jnp.zeros(3)
    >>> at = jax.jit(fusion_divergences)(large, expert, base, jnp.array(1.0))
    >>> print(f"{at.forward:.3f} of {at.target_forward:.3f}")
    0.155 of 0.266

    References:
        Fan et al., On giant's shoulders, 2024 (arXiv 2406.15480), section 3.1, for L. Derivatives
        are ours.
    """
    alpha = jnp.asarray(alpha)
    inputs = read_inputs(logits_large, logits_expert, logits_base, vocab_where)
    # Any upper end serves, as long as it is above alpha.
    path = make_path(inputs, 2.0, axis_name)
    # With the bound on the peak out of use beyond it.
    peak = pmax((path.log_p + alpha[..., None] * path.directions).max(-1), axis_name)
    path = dataclasses.replace(path, peak=peak * path.high / jnp.maximum(alpha, 1e-30))
    moments = path.moments(alpha[None], order=3, axis_name=axis_name)
    at = divergences_at(moments, alpha[None], path.target_forward, path.target_reverse)
    return jax.tree.map(lambda value: value[0], at)
