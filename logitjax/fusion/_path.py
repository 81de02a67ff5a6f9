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

from logitjax.fusion._inputs import Inputs, pmax
from logitjax.ops import AxisName, neginf_to_zero
from logitjax.ops import mesh as on_mesh

# Sums over parts of the vocabulary run on several cores of a CPU, and round less.
_PARTS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Cumulants of h under P_a: `log_z = log E_P[exp(a h)]` and its first derivatives."""

    log_z: Any
    mean: Any
    variance: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
    """P and the directions, one for each expert; `[T, *batch]` but for the first two.

    Attributes:
        log_p: `[*batch, vocab]`, -inf where the vocabulary does not exist; padded to whole parts.
        directions: `[T, *batch, vocab]`, h, centred under P; likewise.
        variance: Of h under P.
        gain: E_P[log expert/base].
        target_forward: KL(expert || base); `target_reverse` is KL(base || expert).
        least: No h lies below, nor above `most`; None unless asked for.
        levels: largest logits of the large model `[1, *batch]`, of experts and of bases.
    """

    log_p: Any
    directions: Any
    variance: Any
    gain: Any
    target_forward: Any
    target_reverse: Any
    least: Any
    most: Any
    levels: tuple[Any, Any, Any]

    def __len__(self) -> int:
        return self.directions.shape[0]

    def moments(
        self, alpha: jax.Array, *, axis_name: AxisName | None, centre: jax.Array | None = None
    ) -> Moments:
        """Cumulants at `alpha` `[T, *batch]`, each expert alone; one all-reduce.

        The nearer `centre` is to the mean, the more digits the variance keeps.
        """
        return _cumulants(self._sums(alpha, 2, centre), centre, axis_name)

    def scan(
        self, values: jax.Array, *, order: int = 1, axis_name: AxisName | None
    ) -> tuple[Any, Moments]:
        """`values` and the cumulants at each, `[num, T, *batch]`; one all-reduce for them all.

        One value after another: nothing of the size of the vocabulary is held for each.
        """
        shape = self.variance.shape
        sums = lax.map(lambda value: self._sums(jnp.full(shape, value), order), values)
        alpha = jnp.broadcast_to(values.reshape(-1, *[1] * len(shape)), (len(values), *shape))
        return alpha, _cumulants(jnp.moveaxis(sums, 1, 0), None, axis_name)

    def _sums(self, alpha: jax.Array, order: int, centre: jax.Array | None = None) -> jax.Array:
        """The largest exponent of the shard, and sums of weights and moments less that."""
        h = self.directions
        x = self.log_p + alpha[..., None] * h
        peak = neginf_to_zero(x.max(-1))
        weight = jnp.exp(x - peak[..., None])
        if centre is not None:
            h = h - centre[..., None]
        sums = [peak, _total(weight)]
        for _ in range(order):
            weight = weight * h
            sums.append(_total(weight))
        return jnp.stack(sums)

    def joint_moments(
        self,
        alphas: jax.Array,
        *,
        axis_name: AxisName | None,
        centre: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """log_z, E[h_t] and Cov[h_s, h_t] with all experts at once; two all-reduces.

        The nearer `centre` is to the means, the more digits the covariances keep.
        """
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


def _cumulants(sums: jax.Array, centre: jax.Array | None, axis_name: AxisName | None) -> Moments:
    if axis_name is None:
        peak, total, *powers = sums
    else:
        # Of every shard its own, by one all-reduce: a maximum first would be another.
        mine = jnp.arange(lax.axis_size(axis_name)) == lax.axis_index(axis_name)
        mine = mine.reshape(-1, *[1] * sums.ndim)
        peaks, sums = jnp.split(on_mesh.psum(jnp.where(mine, sums, 0.0), axis_name), [1], axis=1)
        peak = peaks.max(0)[0]
        total, *powers = (sums * jnp.exp(peaks - peak)).sum(0)
    # log Z generates the cumulants of h under P_a: its derivatives are their mean and variance.
    raw: list[Any] = [power / total for power in powers]
    mean = raw[0] if centre is None else centre + raw[0]
    variance = [jnp.maximum(raw[1] - raw[0] ** 2, 0.0)] if len(raw) > 1 else []
    return Moments(jnp.log(total) + peak, mean, *variance)


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


def make_path(inputs: Inputs, axis_name: AxisName | None, *, extent: bool = False) -> Path:
    """Normalises, centres, and finds what the experts differ from their bases by.

    Two all-reduces, whatever the number of experts; `extent` also finds `least` and `most`.
    """
    inputs = _padded(inputs)
    raw, count = inputs.differences, len(inputs.experts)

    def highest(values: jax.Array) -> jax.Array:
        return jnp.where(inputs.exists, values, -jnp.inf).max(-1)

    maxima = [highest(inputs.large)[None], highest(inputs.experts), highest(inputs.bases)]
    maxima += [highest(raw), highest(-raw)] if extent else []
    cuts = [1, 1 + count, 1 + count + len(inputs.bases)]
    maxima = neginf_to_zero(pmax(jnp.concatenate(maxima), axis_name))
    top, top_expert, top_base, top_raw = jnp.split(maxima, cuts)
    top_raw, top_minus = top_raw[:count], top_raw[count:]
    # Raw logits may carry any constant, which would cost digits of everything below. The extent
    # keeps it until it is known: it is a bound, and needs no digits.
    levels = top, top_expert, top_base
    d = inputs.differences_below(levels)
    inputs = inputs.below(levels)
    exists, large = inputs.exists, inputs.large
    shift = top_expert - top_base

    def weights(logits: jax.Array) -> jax.Array:
        return jnp.exp(jnp.where(exists, logits, -jnp.inf))

    p, q, r = weights(large), weights(inputs.experts), weights(inputs.bases)
    sums = [_total(p)[None], _total(q), _total(r)]
    sums += [_total(values * d) for values in (p, q, r)] + [_total(p * d * d)]
    sums = on_mesh.psum(jnp.concatenate(sums), axis_name)
    cuts = [1, 1 + count, 1 + count + len(inputs.bases)]
    cuts += [cuts[-1] + count, cuts[-1] + 2 * count, cuts[-1] + 3 * count]
    z_p, z_q, z_r, d_p, d_q, d_r, d_squared = jnp.split(sums, cuts)
    mean_p, mean_q, mean_r = d_p / z_p, d_q / z_q, d_r / z_r
    ratio = jnp.log(z_q) - jnp.log(z_r)
    log_z = jnp.log(z_p[0])
    middle = mean_p + shift
    slack = 1e-6 * (jnp.abs(top_expert) + jnp.abs(top_base) + jnp.abs(middle))
    return Path(
        log_p=jnp.where(exists, large - log_z[..., None], -jnp.inf),
        directions=jnp.where(exists, d - mean_p[..., None], 0.0),
        variance=jnp.maximum(d_squared / z_p - mean_p**2, 0.0),
        gain=mean_p - ratio,
        target_forward=jnp.maximum(mean_q - ratio, 0.0),
        target_reverse=jnp.maximum(ratio - mean_r, 0.0),
        least=-(top_minus + middle) - slack if extent else None,
        most=top_raw - middle + slack if extent else None,
        levels=levels,
    )
