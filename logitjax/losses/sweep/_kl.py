import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax import ops
from logitjax.losses.sweep._statistic import LogitBlock, OnlineSums, Statistic
from logitjax.ops import AxisName


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLStatistic(Statistic):
    """`KL(teacher || student)` in one pass, or with `reverse` `KL(student || teacher)`."""

    reverse: bool = False

    in_tiles = gradient_in_tiles = True

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        return OnlineSums.start(batch, dtype, terms=2), OnlineSums.start(batch, dtype)

    def absorb(self, state: Any, block: LogitBlock, passed: Any) -> Any:
        over, under = self.sides(block)
        both = (over != -jnp.inf) & (under != -jnp.inf)
        # Subtract nearly the peak of each side, so that an offset of a side, whose digits would
        # hide the difference, never enters the sums. XLA would write out what the sums of `add`
        # share.
        peaks = [sums.raised(x) for sums, x in zip(state, (over, under), strict=True)]
        gap = self.term(*(x - _base(peak)[..., None] for x, peak in zip((over, under), peaks)))
        terms = jnp.where(both, gap, 0.0), (under == -jnp.inf).astype(over.dtype)
        return self._relative_to(peaks, state).add(over, *terms), state[1].add(under)

    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        peaks = [lax.pmax(lax.stop_gradient(side.peak), axis_name) for side in state]
        return self._relative_to(peaks, state).reduce(axis_name), state[1].reduce(axis_name)

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        over, under = state
        total, gap, escaped = over.sums
        # Mass where the other distribution has none makes the divergence infinite, and its gradient
        # is that of the other entries. Without any mass there is nothing to share.
        shared = jnp.where(total > 0, 1.0 - escaped / jnp.maximum(total, 1e-30), 0.0)
        bases = [_base(side.peak) for side in state]
        logs = [
            side.peak - base + ops.neginf_to_zero(jnp.log(side.sums[0]))
            for side, base in zip(state, bases)
        ]
        finite = gap / jnp.maximum(total, 1e-30) - shared * self.term(logs[0], logs[1])
        value = jnp.where(escaped > 0, jnp.inf, finite)
        if not self.reverse:
            return value, (over.log_z, under.log_z, shared)
        offset = (bases[0] - bases[1]) + (logs[0] - logs[1])
        return value, (over.log_z, offset, finite + shared)

    def gradient(self, residuals: Any, cotangents: Any, block: LogitBlock) -> jax.Array:
        over_z, other, mean = (x[..., None] for x in residuals)
        over, under = self.sides(block)
        p = jnp.exp(over - over_z)
        both = (over != -jnp.inf) & (under != -jnp.inf)
        if self.reverse:
            gradient = p * (jnp.where(both, over - under - other + 1.0, 0.0) - mean)
        else:
            gradient = jnp.exp(under - other) * mean - jnp.where(both, p, 0.0)
        return cotangents[..., None] * gradient

    def sides(self, block: LogitBlock) -> tuple[jax.Array, jax.Array]:
        """Logits of the distribution that weights terms, and of the other one."""
        assert block.teacher is not None
        if self.reverse:
            return block.student, block.teacher
        return block.teacher, block.student

    def term(self, over: jax.Array, under: jax.Array) -> jax.Array:
        """Difference of log-probabilities, linear in both."""
        return over - under

    def _relative_to(self, peaks: Any, state: Any) -> OnlineSums:
        """The first side's sums so far, with the gap relative to the given peaks."""
        (over, (total, gap, escaped)), under = state
        sides = zip((over, under.peak), peaks)
        moved = self.term(*(_base(peak) - _base(new) for peak, new in sides))
        # Initial peaks are far below any logit.
        gap += jnp.where(total > escaped, (total - escaped) * moved, 0.0)
        return OnlineSums(over, (total, gap, escaped))


def _base(peak: jax.Array) -> jax.Array:
    """Round down to an integer, which has few digits, so that differences with it are exact."""
    return jnp.floor(peak)


class TeacherReading(NamedTuple):
    """A teacher's log-probability of the label and entropy in nats, `[*batch]`; no gradient."""

    label: jax.Array
    entropy: jax.Array


@dataclasses.dataclass(frozen=True)
class TeacherStatistic(Statistic):
    """The `TeacherReading` of `tokens["labels"]`."""

    in_tiles = gradient_in_tiles = True

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        return OnlineSums.start(batch, dtype, terms=1), jnp.zeros(batch, dtype)

    def absorb(self, state: Any, block: LogitBlock, passed: Any) -> Any:
        z = block.teacher
        assert z is not None
        label = jnp.where(block.is_at(block.tokens["labels"]), z, 0.0).sum(-1)
        return state[0].add(z, jnp.where(z != -jnp.inf, z, 0.0)), state[1] + label

    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        return state[0].reduce(axis_name), lax.psum(state[1], axis_name)

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        sums, label = state
        total, weighted = sums.sums
        entropy = sums.log_z - weighted / jnp.maximum(total, 1e-30)
        return TeacherReading(label - sums.log_z, entropy), ()

    def gradient(self, residuals: Any, cotangents: Any, block: LogitBlock) -> jax.Array:
        return jnp.zeros_like(block.student)
