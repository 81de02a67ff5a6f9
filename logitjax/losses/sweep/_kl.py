"""Statistics of a Kullback-Leibler divergence, and of the teacher alone."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.losses.sweep._statistic import LogitBlock, OnlineSums, Statistic
from logitjax.ops import AxisName


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLStatistic(Statistic):
    """`KL(teacher || student)` in one pass.

    Attributes:
        reverse: `KL(student || teacher)` instead.
    """

    reverse: bool = False

    @property
    def in_tiles(self) -> bool:
        return True

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        return OnlineSums.start(batch, dtype, terms=2), OnlineSums.start(batch, dtype)

    def absorb(self, state: Any, block: LogitBlock, passed: Any) -> Any:
        over, under = self.sides(block)
        both = (over != -jnp.inf) & (under != -jnp.inf)
        gap = jnp.where(both, over - under, 0.0)
        return state[0].add(over, gap, jnp.where(both, 0.0, 1.0)), state[1].add(under)

    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        return tuple(sums.reduce(axis_name) for sums in state)

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        over, _ = state
        total, gap, escaped = over.sums
        # Mass where the other distribution has none: the divergence is infinite, and its gradient
        # that of the other entries.
        shared = 1.0 - escaped / jnp.maximum(total, 1e-30)
        log_zs = tuple(side.log_z for side in state)
        finite = gap / jnp.maximum(total, 1e-30) - shared * (log_zs[0] - log_zs[1])
        value = jnp.where(escaped > 0, jnp.inf, finite)
        return value, (*log_zs, finite, shared)

    def gradient(self, residuals: Any, cotangents: Any, block: LogitBlock) -> jax.Array:
        over_z, under_z, finite, shared = (x[..., None] for x in residuals)
        over, under = self.sides(block)
        p, q = jnp.exp(over - over_z), jnp.exp(under - under_z)
        both = (over != -jnp.inf) & (under != -jnp.inf)
        if self.reverse:
            ratio = jnp.where(both, over - under - (over_z - under_z) + 1.0, 0.0)
            gradient = p * (ratio - finite - shared)
        else:
            gradient = q * shared - jnp.where(both, p, 0.0)
        return cotangents[..., None] * gradient

    def sides(self, block: LogitBlock) -> tuple[jax.Array, jax.Array]:
        """Logits of the distribution that weighs, and of the one that is compared with it."""
        assert block.teacher is not None
        if self.reverse:
            return block.student, block.teacher
        return block.teacher, block.student


class TeacherReading(NamedTuple):
    """What a teacher says of a position, without a gradient.

    Attributes:
        label: `[*batch]` log-probability of the label.
        entropy: `[*batch]`, in nats.
    """

    label: jax.Array
    entropy: jax.Array


@dataclasses.dataclass(frozen=True)
class TeacherStatistic(Statistic):
    """The `TeacherReading` of `tokens["labels"]`."""

    @property
    def in_tiles(self) -> bool:
        return True

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
