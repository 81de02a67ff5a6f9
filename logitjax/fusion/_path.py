"""The path from one distribution along a direction, its divergences, and rounding bounds.

With P the large model's distribution, d the difference of an expert's and a base's logits and
h = d - E_P[d], the fused distributions P_a ~ P exp(a h) are an exponential family. Fusion only
needs their cumulants: one sweep over the vocabulary, no softmax, no logarithm per entry. With
psi(x) = e^x - 1 - x, and because E_P[h] = 0::

    KL(P || P_a) = log(1 + E_P[psi(a h)]),    E_{P_a}[h] = E_P[h (e^{a h} - 1)] / E_P[e^{a h}]

Nothing is subtracted in these sums, so that divergences of 1e-6 have as many digits as those of
10, and a bound of their rounding is a share of them.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.fusion._inputs import Inputs, pmax
from logitjax.ops import AxisName, neginf_to_zero
from logitjax.ops import mesh as on_mesh

# Sums over parts run on several CPU cores, and round by their length and number alone.
_PARTS = 256
# Relative to exponents of one, in units of rounding: exponential, products and powers.
_STEPS = 16
# Smaller numbers may be rounded to zero.
_VANISHED = 1e-37
# psi(x) / x^2 for |x| < 1, to a unit of rounding in float32 (Taylor).
_PSI = [1 / math.factorial(k) for k in range(12, 1, -1)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """At `alpha`: KL(P_a || P), KL(P || P_a), mean and variance of h, and their error bounds."""

    alpha: Any
    forward: Any
    reverse: Any
    mean: Any
    variance: Any
    errors: tuple[Any, Any, Any, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
    """P and the directions, one for each expert; `[T, *batch]` except for the first two.

    Attributes:
        log_p: `[*batch, vocab]`, -inf for entries that do not exist; padded to whole parts.
        directions: `[T, *batch, vocab]`, h, centred under P; likewise.
        variance: Variance of h under P.
        shift: E_P[h] as left by rounding, and its error bound.
        target_forward: KL(expert || base); `target_reverse` is KL(base || expert).
        target_mean: Mean of h under the expert.
        target_errors: Error bounds of the three targets.
        least: Lower bound of h; `most` is the upper bound.
        levels: largest logits of the large model `[1, *batch]`, of experts and of bases.
    """

    log_p: Any
    directions: Any
    variance: Any
    shift: tuple[Any, Any]
    target_forward: Any
    target_reverse: Any
    target_mean: Any
    target_errors: tuple[Any, Any, Any]
    least: Any
    most: Any
    levels: tuple[Any, Any, Any]

    def __len__(self) -> int:
        return self.directions.shape[0]

    def moments(
        self, alpha: jax.Array, *, axis_name: AxisName | None, centre: jax.Array | float = 0.0
    ) -> Moments:
        """Moments at `alpha` `[T, *batch]`, each expert alone; one all-reduce."""
        # The nearer `centre` is to the mean, the more digits the variance keeps.
        sums = _gathered(_sums(self.log_p, self.directions, alpha, centre), axis_name)
        return _moments(sums, alpha, centre, self.shift, self.log_p.shape[-1], axis_name)

    def scan(self, values: jax.Array, *, axis_name: AxisName | None) -> Moments:
        """Moments at each of the `values`, `[num, T, *batch]`; one all-reduce for all."""
        # Sharded like the batch.
        alpha = values.reshape(-1, *[1] * self.variance.ndim) + jnp.zeros_like(self.variance)
        sums = lax.map(lambda one: _sums(self.log_p, self.directions, one, 0.0), alpha)
        sums = _gathered(jnp.moveaxis(sums, 1, 0), axis_name)
        return _moments(sums, alpha, 0.0, self.shift, self.log_p.shape[-1], axis_name)

    def joint_moments(
        self, alphas: jax.Array, *, axis_name: AxisName | None, centre: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """log_z, E[h_t] and Cov[h_s, h_t] with all experts at once; two all-reduces."""
        h = self.directions
        x = self.log_p + (alphas[..., None] * h).sum(0)
        if centre is not None:
            h = h - centre[..., None]
        offset = neginf_to_zero(pmax(x.max(-1), axis_name))
        weight = jnp.exp(x - offset[..., None])
        count = len(h)
        sums = [_total(weight)]
        sums += [_total(weight * h[t]) for t in range(count)]
        pairs = [(s, t) for s in range(count) for t in range(s + 1)]
        sums += [_total(weight * h[s] * h[t]) for s, t in pairs]
        total, *rest = on_mesh.psum(jnp.stack(sums), axis_name)
        means = [value / total for value in rest[:count]]
        covariance: dict[tuple[int, int], jax.Array] = {}
        for (s, t), value in zip(pairs, rest[count:], strict=True):
            covariance[s, t] = covariance[t, s] = value / total - means[s] * means[t]
        rows = [jnp.stack([covariance[s, t] for t in range(count)]) for s in range(count)]
        mean = jnp.stack(means) if centre is None else centre + jnp.stack(means)
        return jnp.log(total) + offset, mean, jnp.stack(rows)


def _sums(log_p: jax.Array, h: jax.Array, alpha: jax.Array, centre: jax.Array | float) -> jax.Array:
    """The shard's peak and, relative to it, sums of psi, h (e^x - 1), (h - centre)^2, h - centre.

    Also their rounding errors in units: one for the first two sums, one for the third.
    """
    x = alpha[..., None] * h
    exponent = log_p + x
    peak = jnp.maximum(exponent.max(-1), 0.0)
    weight = jnp.exp(exponent - peak[..., None])
    local = jnp.exp(log_p) * jnp.exp(-peak)[..., None]
    psi = jnp.square(x) * functools.reduce(lambda series, c: series * x + c, _PSI)
    near = jnp.abs(x) < 1
    psi = jnp.where(near, local * psi, weight - local * (1 + x))
    rise = jnp.where(near, local * x + psi, weight - local)
    apart = h - jnp.asarray(centre)[..., None]
    square = weight * jnp.square(apart)
    # Exponents are rounded by a share of their terms, and sums by as much; small numbers vanish.
    steps = 4 * jnp.abs(neginf_to_zero(log_p)) + 6 * jnp.abs(x)
    steps += (_STEPS + math.log(h.shape[-1]) + peak)[..., None]
    terms = jnp.where(near, jnp.abs(rise), weight + 2 * local) + (1 + jnp.abs(x)) * _VANISHED
    noise, noise_square = steps * jnp.abs(h) * terms, steps * square
    values = psi, h * rise, square, weight * apart, noise, noise_square
    return jnp.stack([peak, *(_total(x) for x in values)])


def _gathered(sums: jax.Array, axis_name: AxisName | None, plain: int = 0) -> jax.Array:
    """Peak and sums of all shards by one all-reduce; the last `plain` are sums without a peak."""
    if axis_name is None:
        return sums
    is_local = jnp.arange(lax.axis_size(axis_name)) == lax.axis_index(axis_name)
    is_local = is_local.reshape(-1, *[1] * sums.ndim)
    peaks, sums = jnp.split(on_mesh.psum(jnp.where(is_local, sums, 0.0), axis_name), [1], axis=1)
    peak, count = peaks.max(0), sums.shape[1] - plain
    scaled = sums[:, :count] * jnp.exp(peaks - peak)
    return jnp.concatenate([peak, scaled.sum(0), sums[:, count:].sum(0)])


def _moments(
    sums: jax.Array,
    alpha: jax.Array,
    centre: jax.Array | float,
    shift: tuple[jax.Array, jax.Array],
    vocab: int,
    axis_name: AxisName | None,
) -> Moments:
    """Moments from sums. Errors are first-order bounds with room for the second order."""
    peak, psi, moved, square, apart, noise, noise_square = sums
    unit, depth, share = _rounding(vocab, axis_name, sums.dtype)
    local = jnp.exp(-peak)
    # Without the part due to h + c in place of h, which may dominate divergences of 1e-12.
    (c, doubt), turn = shift, alpha * shift[0]
    moved = moved - c * (psi + local * turn)
    psi = jnp.maximum((psi - local * (turn**2 / 2) * (1 + turn / 3)) * (1 - turn), 0.0)
    total = (local + psi) * (1 + turn)
    near = jnp.log1p(psi * jnp.exp(jnp.minimum(peak, 80.0)))
    reverse = jnp.where(psi < local, near, jnp.log(local + psi) + peak)
    mean, square, noise_square = moved / total, square / total, unit * noise_square / total
    # psi(x) <= x (e^x - 1): the error of the mean, times alpha, is that of the normaliser.
    numerator = unit * (noise / total + depth * mean)
    # Or, far from P, the mean rounding of an exponent, by the entropy, which is log vocab at most.
    steps = 8 * _STEPS + 20 * math.log(vocab) + peak + 20 * alpha * mean
    relative = jnp.minimum(share + alpha * numerator, unit * (steps + depth))
    rest = doubt * jnp.minimum(reverse, 1.0)
    rest += alpha * (doubt * (2 * jnp.abs(c) + doubt) + _STEPS * unit * c**2)
    mean_error = numerator + mean * relative + rest
    # There P_a is close to the centre, and roundings of weights move the rest.
    other = centre - c + apart / total
    other_error = jnp.sqrt(unit * steps * noise_square) + (relative + depth * unit) * jnp.sqrt(
        square
    )
    other_error += doubt + 4 * unit * (jnp.abs(centre) + jnp.abs(c) + jnp.abs(other))
    better = other_error < mean_error
    mean = jnp.where(better, jnp.maximum(other, 0.0), mean)
    mean_error = jnp.minimum(mean_error, other_error)
    reverse_error = jnp.minimum(alpha * numerator, relative) + (share + _STEPS * unit) * reverse
    reverse_error += alpha * rest
    forward_error = alpha * mean_error + reverse_error + 4 * unit * alpha * mean
    apart = mean + c - centre
    variance_error = (
        noise_square
        + (relative + (depth + _STEPS) * unit) * square
        + (2 * jnp.abs(apart) + mean_error) * mean_error
        + 4 * unit * (jnp.square(apart) + jnp.abs(centre) * jnp.sqrt(square))
    )
    errors: Any = forward_error, reverse_error, mean_error, variance_error
    errors = tuple(jnp.where(relative < 0.1, 1.2 * error, jnp.inf) for error in errors)
    return Moments(
        alpha,
        jnp.maximum(alpha * mean - reverse, 0.0),
        reverse,
        mean,
        jnp.maximum(square - jnp.square(apart), 0.0),
        errors,
    )


def _rounding(vocab: int, axis_name: AxisName | None, dtype: Any) -> tuple[float, int, float]:
    """Unit of rounding, additions in a sum, and the relative error of an expectation under P."""
    # Exponents log p are rounded by a share of themselves, and E_P[(log p)^2] is at most
    # (log vocab + 1)^2: by Cauchy's inequality that is the error relative to a root mean square.
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    depth = shards + (vocab if vocab < 4 * _PARTS else _PARTS + vocab // _PARTS)
    unit = float(jnp.finfo(dtype).eps) / 2
    return unit, depth, unit * (depth + _STEPS + 6 * (math.log(vocab * shards) + 1))


def _total(values: jax.Array) -> jax.Array:
    vocab = values.shape[-1]
    if vocab < 4 * _PARTS:
        return values.sum(-1)
    sums = values.reshape(*values.shape[:-1], _PARTS, vocab // _PARTS).sum(-1)
    # Otherwise the compiler merges the two sums, which loses two digits at a vocabulary of 50,000.
    return lax.optimization_barrier(sums).sum(-1)


def _padded(inputs: Inputs) -> Inputs:
    """Padded with absent entries to whole parts of the vocabulary."""
    vocab = inputs.large.shape[-1]
    extra = -vocab % _PARTS if vocab >= 4 * _PARTS else 0
    if not extra:
        return inputs
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)]), inputs)


def make_path(inputs: Inputs, axis_name: AxisName | None) -> Path:
    """Normalise, centre, and compute how experts differ from bases; three all-reduces."""
    inputs = _padded(inputs)
    raw, count, vocab = inputs.differences, len(inputs.experts), inputs.large.shape[-1]

    def highest(values: jax.Array) -> jax.Array:
        return jnp.where(inputs.exists, values, -jnp.inf).max(-1)

    maxima = [highest(inputs.large)[None], highest(inputs.experts), highest(inputs.bases)]
    maxima += [highest(raw), highest(-raw)]
    cuts = [1, 1 + count, 1 + count + len(inputs.bases)]
    maxima = neginf_to_zero(pmax(jnp.concatenate(maxima), axis_name))
    top, top_expert, top_base, top_raw = jnp.split(maxima, cuts)
    top_raw, top_minus = top_raw[:count], top_raw[count:]
    # Raw logits may contain any constant, which would cost digits in everything below. The extent
    # keeps it until it is known: it is a bound and needs no digits.
    levels = top, top_expert, top_base
    exists, d = inputs.exists, inputs.differences_below(levels)
    below = inputs.below(levels)
    logs = [jnp.where(exists, x, -jnp.inf) for x in (below.large[None], below.bases)]
    weights = [jnp.exp(x) for x in logs]
    sums = [_total(w) for w in weights] + [_total(w * d) for w in weights]
    cuts = [1, 1 + len(inputs.bases), 1 + len(inputs.bases) + count]
    z_p, z_b, d_p, d_b = jnp.split(on_mesh.psum(jnp.concatenate(sums), axis_name), cuts)
    means = d_p / z_p, d_b / z_b
    log_p, log_b = (x - jnp.log(z)[..., None] for x, z in zip(logs, (z_p, z_b), strict=True))
    h, h_base = (inputs.differences_below(levels, less=mean) for mean in means)
    # The expert is its base moved by 1: the same family, and sums that keep small divergences.
    moved = _sums(log_b, h_base, jnp.ones_like(d_p), 0.0)
    moments = [_total(jnp.exp(x) * y**k) for x, y in ((log_p, h), (log_b, h_base)) for k in (1, 2)]
    sums = _gathered(jnp.stack([*moved, *moments]), axis_name, plain=len(moments))
    rest_p, variance, rest_b, variance_b = sums[7:]
    unit, _, share = _rounding(vocab, axis_name, variance.dtype)
    left = [share * jnp.sqrt(2 * v) for v in (variance, variance_b)]
    expert = _moments(sums[:7], jnp.ones_like(d_p), 0.0, (rest_b, left[1]), vocab, axis_name)
    change = means[1] - means[0]
    middle = means[0] + (top_expert - top_base)
    slack = 1e-6 * (jnp.abs(top_expert) + jnp.abs(top_base) + jnp.abs(middle))
    return Path(
        log_p=log_p[0],
        directions=h,
        variance=variance,
        shift=(rest_p, left[0]),
        target_forward=expert.forward,
        target_reverse=expert.reverse,
        target_mean=expert.mean + (change + (rest_b - rest_p)),
        target_errors=(
            *expert.errors[:2],
            expert.errors[2] + left[0] + left[1] + 4 * unit * jnp.abs(change),
        ),
        least=-(top_minus + middle) - slack,
        most=top_raw - middle + slack,
        levels=levels,
    )
