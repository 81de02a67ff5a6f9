import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax import ops
from logitjax.losses.sweep._statistic import LogitBlock, OnlineSums, Statistic
from logitjax.ops import AxisName


class Outputs(NamedTuple):
    """Results of a `ReadoutStatistic`; None for those not requested."""

    log_z: Any
    label: Any = None
    gathered: Any = None
    values: Any = None
    indices: Any = None
    mean: Any = None
    std: Any = None


class _Moments(NamedTuple):
    """Count, mean and summed squared deviation, merged block by block without cancellation."""

    count: jax.Array
    mean: jax.Array
    # Divided by the square of the unit; None if only the mean is needed.
    deviation: Any
    unit: Any = None

    def add(self, logits: jax.Array) -> "_Moments":
        # Not `isfinite`: a nan has to make the mean nan.
        present = logits != -jnp.inf
        count = present.sum(-1).astype(logits.dtype)
        mean = jnp.where(present, logits, 0.0).sum(-1) / jnp.maximum(count, 1)
        if self.deviation is None:
            return self.merge(_Moments(count, mean, None))
        # Squares of logits beyond 2^64 overflow. Below 2^40 the mean and the largest logit bound
        # all others; above it logits are so far apart that no squared difference underflows.
        large = jnp.maximum(jnp.abs(mean), logits.max(-1)) > 2.0**40
        unit = jnp.where(large, 2.0**76, 1.0).astype(mean.dtype)
        off = jnp.where(present, (logits - mean[..., None]) * (1.0 / unit)[..., None], 0.0)
        return self.merge(_Moments(count, mean, jnp.square(off).sum(-1), unit))

    def merge(self, other: "_Moments") -> "_Moments":
        count = jnp.maximum(self.count + other.count, 1)
        apart = other.mean - self.mean
        share = other.count / count
        deviation = unit = None
        if self.deviation is not None:
            # Chan's merge: squares about both means, and the distance of the means.
            unit = jnp.maximum(self.unit, other.unit)
            deviation = self.deviation_in(unit) + other.deviation_in(unit)
            deviation += jnp.square(apart / unit) * self.count * share
        return _Moments(self.count + other.count, self.mean + apart * share, deviation, unit)

    def deviation_in(self, unit: jax.Array) -> jax.Array:
        return self.deviation * jnp.square(self.unit / unit)

    def reduce(self, axis_name: AxisName) -> "_Moments":
        sums = jnp.stack([self.count, self.count * self.mean])
        count, total = lax.psum(sums, axis_name)
        mean = total / jnp.maximum(count, 1)
        if self.deviation is None:
            return _Moments(count, mean, None)
        unit = lax.pmax(lax.stop_gradient(self.unit), axis_name)
        deviation = self.deviation_in(unit) + self.count * jnp.square((self.mean - mean) / unit)
        return _Moments(count, mean, lax.psum(deviation, axis_name), unit)


class _State(NamedTuple):
    sums: OnlineSums
    label: Any
    gathered: Any
    values: Any
    indices: Any
    moments: _Moments | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadoutStatistic(Statistic):
    """The log-normaliser and, on request, single logits, the largest ones, mean and deviation.

    Its outputs have `log_z`, and None for what was not requested. For a custom loss of these
    outputs, subclass it and define `losses`.

    Attributes:
        labels: whether to read `label`, the logit at `tokens["labels"]`.
        ids: number of ids per position in `tokens["ids"]`, whose logits are `gathered`.
        k: number of largest logits to keep as `values` and `indices`.
        mean: whether to compute the `mean` of valid logits.
        moments: whether to compute their `mean` and `std`.
    """

    labels: bool = False
    ids: int = 0
    k: int = 0
    mean: bool = False
    moments: bool = False

    # Kernels find ids by comparison, the k largest by bins.
    in_tiles = gradient_in_tiles = True

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> _State:
        def zeros(*shape):
            return jnp.zeros((*batch, *shape), dtype)

        return _State(
            OnlineSums.start(batch, dtype),
            zeros() if self.labels else None,
            zeros(self.ids) if self.ids else None,
            jnp.full((*batch, self.k), -jnp.inf, dtype) if self.k else None,
            jnp.zeros((*batch, self.k), jnp.int32) if self.k else None,
            _Moments(zeros(), zeros(), *((zeros(), 1 + zeros()) if self.moments else (None,)))
            if self.mean or self.moments
            else None,
        )

    def absorb(self, state: _State, block: LogitBlock, passed: Any) -> _State:
        z = block.student
        label, gathered, values, indices, moments = state[1:]
        if label is not None:
            label = label + jnp.where(block.is_at(block.tokens["labels"]), z, 0.0).sum(-1)
        if gathered is not None:
            gathered = gathered + block.gather(block.tokens["ids"])
        if values is not None:
            size = min(self.k, z.shape[-1])
            more, places = ops.top_k(z, size)
            ids = block.columns[0] + places
            both = jnp.concatenate([values, more], -1)
            values, places = lax.top_k(both, self.k)
            indices = jnp.take_along_axis(jnp.concatenate([indices, ids], -1), places, -1)
        if moments is not None:
            moments = moments.add(z)
        return _State(state.sums.add(z), label, gathered, values, indices, moments)

    def reduce(self, state: _State, axis_name: AxisName, passed: Any) -> _State:
        label, gathered, values, indices, moments = state[1:]
        if label is not None:
            label = lax.psum(label, axis_name)
        if gathered is not None:
            gathered = lax.psum(gathered, axis_name)
        if values is not None:
            axis = values.ndim - 1
            values, indices = (
                lax.all_gather(x, axis_name, axis=axis, tiled=True, to="invarying")
                for x in (values, indices)
            )
            values, places = lax.top_k(values, self.k)  # of shards * k
            indices = jnp.take_along_axis(indices, places, -1)
        if moments is not None:
            moments = moments.reduce(axis_name)
        return _State(state.sums.reduce(axis_name), label, gathered, values, indices, moments)

    def finish(self, state: _State, passed: Any) -> tuple[Outputs, Any]:
        mean = std = None
        if state.moments is not None:
            mean = state.moments.mean
            if state.moments.deviation is not None:
                variance = state.moments.deviation / jnp.maximum(state.moments.count, 1)
                # Population deviation, not an estimate.
                std = state.moments.unit * jnp.sqrt(variance)
        out = Outputs(
            state.sums.log_sum, state.label, state.gathered, state.values, state.indices, mean, std
        )
        return out, (out, None if state.moments is None else state.moments.count)

    def gradient(self, residuals: Any, cotangents: Outputs, block: LogitBlock) -> jax.Array:
        out, count = residuals
        z, ct = block.student, cotangents
        # d log z / dz is the softmax; gradients of other outputs are added where they were read.
        total = ct.log_z[..., None] * jnp.exp(z - ops.neginf_to_zero(out.log_z)[..., None])
        if ct.label is not None:
            hit = block.is_at(block.tokens["labels"])
            total = total + jnp.where(hit, ct.label[..., None], 0.0)
        if ct.gathered is not None:
            total = block.scatter(total, block.tokens["ids"], ct.gathered)
        if ct.values is not None:
            total = block.scatter(total, out.indices, ct.values)
        if count is not None:
            count = jnp.maximum(count, 1)
            dense = (ct.mean / count)[..., None]
            if out.std is not None:
                # The deviation of equal logits has no gradient.
                least = jnp.maximum(out.std, 1e-30)
                spread = jnp.where(out.std > 0, ct.std / count, 0.0)
                # Divide logits by the deviation first: the cotangent divided by it may overflow
                # float32.
                dense = dense - (spread * (out.mean / least))[..., None]
                dense = dense + spread[..., None] * (z * (1.0 / least)[..., None])
            total = total + jnp.where(z != -jnp.inf, dense, 0.0)
        return total
