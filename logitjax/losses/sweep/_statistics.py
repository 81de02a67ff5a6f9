"""What a sweep over the vocabulary accumulates, and what each part contributes to the gradient."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax import ops
from logitjax.losses.sweep._engine import Block
from logitjax.ops import AxisName


class OnlineSums(NamedTuple):
    """Sums weighted by ``exp(logits)``, relative to the largest logit seen so far."""

    peak: jax.Array
    sums: tuple[jax.Array, ...]  # the plain sum first

    @classmethod
    def start(cls, batch: tuple[int, ...], count: int, dtype) -> "OnlineSums":
        # Not -inf, whose difference with itself would be nan.
        peak = jnp.full(batch, jnp.finfo(dtype).min, dtype)
        return cls(peak, tuple(jnp.zeros(batch, dtype) for _ in range(count)))

    def add(self, logits: jax.Array, *terms: jax.Array) -> "OnlineSums":
        peak = jnp.maximum(self.peak, logits.max(-1))
        weights = jnp.exp(logits - peak[..., None])
        news = [weights, *(weights * term for term in terms)]
        old = self._rescaled(peak)
        return OnlineSums(peak, tuple(s + new.sum(-1) for s, new in zip(old, news)))

    def reduce(self, axis_name: AxisName) -> "OnlineSums":
        peak = lax.pmax(self.peak, axis_name)
        sums = lax.psum(jnp.stack(self._rescaled(peak)), axis_name)
        return OnlineSums(peak, tuple(sums))

    def _rescaled(self, peak: jax.Array) -> list[jax.Array]:
        scale = jnp.exp(self.peak - peak)
        return [s * scale for s in self.sums]

    @property
    def log_sum(self) -> jax.Array:
        return self.peak + jnp.log(self.sums[0])


def _softmax(logits: jax.Array, log_z: jax.Array) -> jax.Array:
    return jnp.exp(logits - ops.finite_or_zero(log_z)[..., None])


class Readout(NamedTuple):
    """What `ReadoutStatistic` gives: arrays, None for what was not asked."""

    log_z: Any
    label: Any = None  # logit at tokens["labels"]
    gathered: Any = None  # logits at tokens["ids"]
    values: Any = None
    indices: Any = None
    mean: Any = None
    std: Any = None


class _Moments(NamedTuple):
    """Count, mean and summed squared deviation, merged block by block without cancellation."""

    count: jax.Array
    mean: jax.Array
    deviation: jax.Array

    def add(self, logits: jax.Array) -> "_Moments":
        finite = jnp.isfinite(logits)
        count = finite.sum(-1).astype(logits.dtype)
        mean = jnp.where(finite, logits, 0.0).sum(-1) / jnp.maximum(count, 1)
        off = jnp.where(finite, logits - mean[..., None], 0.0)
        return self.merge(_Moments(count, mean, jnp.square(off).sum(-1)))

    def merge(self, other: "_Moments") -> "_Moments":
        count = jnp.maximum(self.count + other.count, 1)
        apart = other.mean - self.mean
        share = other.count / count
        deviation = self.deviation + other.deviation + jnp.square(apart) * self.count * share
        return _Moments(self.count + other.count, self.mean + apart * share, deviation)

    def reduce(self, axis_name: AxisName) -> "_Moments":
        sums = jnp.stack([self.count, self.count * self.mean])
        count, total = lax.psum(sums, axis_name)
        mean = total / jnp.maximum(count, 1)
        deviation = self.deviation + self.count * jnp.square(self.mean - mean)
        return _Moments(count, mean, lax.psum(deviation, axis_name))


class _ReadoutState(NamedTuple):
    sums: OnlineSums
    label: Any
    gathered: Any
    values: Any
    indices: Any
    moments: _Moments | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadoutStatistic:
    """log Z and, as asked, the label's logit, logits at ids, the top k, mean and deviation."""

    labels: bool = False
    ids: int = 0
    k: int = 0
    moments: bool = False
    dtype: Any = jnp.float32

    passes = 1

    def start(self, batch: tuple[int, ...], passed: Any) -> _ReadoutState:
        def zeros(*shape):
            return jnp.zeros((*batch, *shape), self.dtype)

        return _ReadoutState(
            OnlineSums.start(batch, 1, self.dtype),
            zeros() if self.labels else None,
            zeros(self.ids) if self.ids else None,
            jnp.full((*batch, self.k), -jnp.inf, self.dtype) if self.k else None,
            jnp.zeros((*batch, self.k), jnp.int32) if self.k else None,
            _Moments(zeros(), zeros(), zeros()) if self.moments else None,
        )

    def absorb(self, state: _ReadoutState, block: Block, passed: Any) -> _ReadoutState:
        z = block.student
        label, gathered, values, indices, moments = state[1:]
        if label is not None:
            hit = self._hit(block)
            label = label + jnp.where(hit, z, 0.0).sum(-1)
        if gathered is not None:
            places, inside = _places(block, block.tokens["ids"])
            found = jnp.take_along_axis(z, places, axis=-1)
            gathered = gathered + jnp.where(inside, found, 0.0)
        if values is not None:
            size = min(self.k, z.shape[-1])
            more, places = ops.top_k(z, size)
            ids = block.columns[0] + places
            both = jnp.concatenate([values, more], -1)
            values, places = lax.top_k(both, self.k)
            indices = jnp.take_along_axis(jnp.concatenate([indices, ids], -1), places, -1)
        if moments is not None:
            moments = moments.add(z)
        return _ReadoutState(state.sums.add(z), label, gathered, values, indices, moments)

    def reduce(self, state: _ReadoutState, axis_name: AxisName, passed: Any) -> _ReadoutState:
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
            values, places = lax.top_k(values, self.k)
            indices = jnp.take_along_axis(indices, places, -1)
        if moments is not None:
            moments = moments.reduce(axis_name)
        sums = state.sums.reduce(axis_name)
        return _ReadoutState(sums, label, gathered, values, indices, moments)

    def finish(self, state: _ReadoutState, passed: Any) -> tuple[Readout, Any]:
        mean = std = None
        if state.moments is not None:
            count = jnp.maximum(state.moments.count, 1)
            mean, std = state.moments.mean, jnp.sqrt(state.moments.deviation / count)
        out = Readout(
            state.sums.log_sum, state.label, state.gathered, state.values, state.indices, mean, std
        )
        return out, (out, None if state.moments is None else state.moments.count)

    def gradient(self, residuals: Any, cotangents: Readout, block: Block) -> jax.Array:
        out, count = residuals
        z, ct = block.student, cotangents
        total = ct.log_z[..., None] * _softmax(z, out.log_z)
        if ct.label is not None:
            total = total + jnp.where(self._hit(block), ct.label[..., None], 0.0)
        if ct.gathered is not None:
            total = _scatter(total, block, block.tokens["ids"], ct.gathered)
        if ct.values is not None:
            total = _scatter(total, block, out.indices, ct.values)
        if count is not None:
            count = jnp.maximum(count, 1)
            spread = jnp.where(out.std > 0, ct.std / (count * jnp.maximum(out.std, 1e-30)), 0.0)
            flat = ct.mean / count - spread * out.mean
            dense = flat[..., None] + spread[..., None] * z
            total = total + jnp.where(jnp.isfinite(z), dense, 0.0)
        return total

    def _hit(self, block: Block) -> jax.Array:
        fresh = jnp.arange(block.columns.size) >= block.first
        return fresh & (block.columns == block.tokens["labels"][..., None])


def _places(block: Block, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where ids lie in the block, and which of them do (clipped where they do not)."""
    places = ids - block.columns[0]
    inside = (places >= block.first) & (places < block.columns.size)
    return jnp.clip(places, 0, block.columns.size - 1), inside


def _scatter(total: jax.Array, block: Block, ids: jax.Array, values: jax.Array) -> jax.Array:
    places, inside = _places(block, ids)
    rows = tuple(
        lax.broadcasted_iota(jnp.int32, places.shape, axis) for axis in range(places.ndim - 1)
    )
    return total.at[(*rows, places)].add(jnp.where(inside, values, 0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLStatistic:
    """``KL(teacher || student)``, or ``KL(student || teacher)`` where ``reverse``; one pass."""

    reverse: bool = False
    dtype: Any = jnp.float32

    passes = 1

    def start(self, batch: tuple[int, ...], passed: Any):
        over, under = (OnlineSums.start(batch, count, self.dtype) for count in (3, 1))
        return over, under

    def absorb(self, state, block: Block, passed: Any):
        over, under = self._sides(block)
        both = (over > -jnp.inf) & (under > -jnp.inf)
        gap = jnp.where(both, over - under, 0.0)
        return state[0].add(over, gap, jnp.where(both, 0.0, 1.0)), state[1].add(under)

    def reduce(self, state, axis_name: AxisName, passed: Any):
        return tuple(sums.reduce(axis_name) for sums in state)

    def finish(self, state, passed: Any):
        over, _ = state
        total, gap, escaped = over.sums
        # Mass where the other distribution has none: the divergence is infinite, and its gradient
        # that of the other entries.
        shared = 1.0 - escaped / jnp.maximum(total, 1e-30)
        log_zs = tuple(ops.finite_or_zero(side.log_sum) for side in state)
        finite = gap / jnp.maximum(total, 1e-30) - shared * (log_zs[0] - log_zs[1])
        value = jnp.where(escaped > 0, jnp.inf, finite)
        return value, (*log_zs, finite, shared)

    def gradient(self, residuals, cotangents, block: Block) -> jax.Array:
        over_z, under_z, finite, shared = (x[..., None] for x in residuals)
        over, under = self._sides(block)
        p, q = jnp.exp(over - over_z), jnp.exp(under - under_z)
        both = (over > -jnp.inf) & (under > -jnp.inf)
        if self.reverse:
            ratio = jnp.where(both, over - under - (over_z - under_z) + 1.0, 0.0)
            gradient = p * (ratio - finite - shared)
        else:
            gradient = q * shared - jnp.where(both, p, 0.0)
        return cotangents[..., None] * gradient

    def _sides(self, block: Block) -> tuple[jax.Array, jax.Array]:
        """The distribution that weighs, and the one that is compared with it."""
        assert block.teacher is not None
        if self.reverse:
            return block.student, block.teacher
        return block.teacher, block.student


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalisedStatistic:
    """Divergences whose terms need both normalisers first: two passes.

    ``terms`` gives, per column, the summand and its derivative by the student's log-probability.
    """

    dtype: Any = jnp.float32

    passes = 2

    def terms(self, log_q: jax.Array, log_p: jax.Array) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError

    def start(self, batch: tuple[int, ...], passed: Any):
        if passed is None:
            return tuple(OnlineSums.start(batch, 1, self.dtype) for _ in range(2))
        return jnp.zeros(batch, self.dtype), jnp.zeros(batch, self.dtype)

    def absorb(self, state, block: Block, passed: Any):
        if passed is None:
            return state[0].add(block.student), state[1].add(block.teacher)
        terms = self.terms(*self._log_probabilities(block, passed))
        return tuple(total + term.sum(-1) for total, term in zip(state, terms))

    def reduce(self, state, axis_name: AxisName, passed: Any):
        if passed is None:
            return tuple(sums.reduce(axis_name) for sums in state)
        return tuple(lax.psum(jnp.stack(state), axis_name))

    def finish(self, state, passed: Any):
        if passed is None:
            return None, tuple(ops.finite_or_zero(sums.log_sum) for sums in state)
        return state[0], (*passed, state[1])

    def gradient(self, residuals, cotangents, block: Block) -> jax.Array:
        *log_zs, slope_sum = residuals
        log_q, log_p = self._log_probabilities(block, log_zs)
        slope = self.terms(log_q, log_p)[1]
        return cotangents[..., None] * (slope - jnp.exp(log_q) * slope_sum[..., None])

    def _log_probabilities(self, block: Block, log_zs):
        assert block.teacher is not None
        return block.student - log_zs[0][..., None], block.teacher - log_zs[1][..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JensenShannonStatistic(NormalisedStatistic):
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``."""

    beta: float

    def terms(self, log_q: jax.Array, log_p: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_m = jnp.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
        q_part = (1 - self.beta) * jnp.where(
            log_q > -jnp.inf, jnp.exp(log_q) * (log_q - log_m), 0.0
        )
        p_part = self.beta * jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_m), 0.0)
        return p_part + q_part, q_part


@dataclasses.dataclass(frozen=True, kw_only=True)
class TotalVariationStatistic(NormalisedStatistic):
    """Half the summed absolute difference of the probabilities."""

    def terms(self, log_q: jax.Array, log_p: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = jnp.exp(log_q)
        apart = q - jnp.exp(log_p)
        return 0.5 * jnp.abs(apart), 0.5 * jnp.sign(apart) * q
