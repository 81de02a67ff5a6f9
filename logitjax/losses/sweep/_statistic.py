"""Accumulators of a sweep: the interface, and parts shared by most statistics."""

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax import ops
from logitjax.losses.sweep import _ids
from logitjax.ops import Array, AxisName


class LogitBlock(NamedTuple):
    """The logits of some positions at some columns of the vocabulary, divided by the temperature.

    Attributes:
        student: `[*batch, block]`, float32; `-inf` where a column does not count, for example
            because an earlier block had it.
        teacher: the same for the teacher; None without one.
        columns: `[block]` int32, ids in the whole vocabulary; in a kernel `[1, block]`, negative
            past the end of the vocabulary.
        first: index of the first column that no earlier block had; 0 if none is repeated.
        tokens: the arrays given to `run`, `[*batch, ...]`.
        together: where gathers and scatters are slow, the number of a position's ids to find at a
            time by comparison; 0 where they are fast, as on a CPU.
    """

    student: jax.Array
    teacher: jax.Array | None
    columns: jax.Array
    first: jax.Array | int
    tokens: Any
    together: int = 0

    def is_at(self, ids: Array) -> jax.Array:
        """True where a block's column is the position's id: `[*batch, block]` boolean."""
        present = self.columns == jnp.asarray(ids)[..., None]
        if isinstance(self.first, int) and self.first == 0:
            return present
        return present & (jnp.arange(self.columns.size) >= self.first)

    def gather(self, ids: Array) -> jax.Array:
        """The student's logits at `ids`, `[*batch, n]`; zero for ids of other blocks."""
        if self.together:
            return _ids.pick(self.together, self.student, self._new_columns(), _as_int32(ids))
        places, inside = self._places(ids)
        return jnp.where(inside, jnp.take_along_axis(self.student, places, axis=-1), 0.0)

    def scatter(self, total: jax.Array, ids: Array, values: jax.Array) -> jax.Array:
        """`total`, `[*batch, block]`, with `values` added at `ids`, both `[*batch, n]`."""
        if self.together:
            # Into zeros: otherwise the total itself would be written.
            empty, columns = jnp.zeros_like(total), self._new_columns()
            placed: Any = _ids.place(self.together, empty, columns, _as_int32(ids), values)
            return total + placed
        places, inside = self._places(ids)
        rows = tuple(
            lax.broadcasted_iota(jnp.int32, places.shape, axis) for axis in range(places.ndim - 1)
        )
        return total.at[(*rows, places)].add(jnp.where(inside, values, 0.0))

    def _new_columns(self) -> jax.Array:
        if isinstance(self.first, int) and self.first == 0:
            return self.columns
        return jnp.where(jnp.arange(self.columns.size) < self.first, _ids.NOWHERE, self.columns)

    def _places(self, ids: Array) -> tuple[jax.Array, jax.Array]:
        """Local indices of ids in the block, clipped, and which of the ids are in it."""
        places = jnp.asarray(ids) - self.columns[0]
        inside = (places >= self.first) & (places < self.columns.size)
        return jnp.clip(places, 0, self.columns.size - 1), inside


def _as_int32(ids: Array) -> jax.Array:
    return jnp.asarray(ids).astype(jnp.int32)


class Statistic(abc.ABC):
    """A few numbers per position that are accumulated over the vocabulary, and their gradient.

    A statistic is hashable and holds no arrays (a frozen dataclass is best): it is a static
    argument of the sweep. Every array of its state and of its results starts with the batch shape,
    and nothing crosses positions, because a sweep may cut them into blocks.

    A statistic with more than one pass over the vocabulary restarts in each; `passed` holds the
    residuals of the previous pass, None in the first.

    Attributes:
        passes: number of passes over the vocabulary.
        in_tiles: whether a kernel can run `start` and `absorb` on data on chip. They must consist
            of elementwise operations, comparisons, `LogitBlock.gather`, and sums and maxima over
            the last axis (no sort, no other gather).
        gradient_in_tiles: whether a kernel can also run `gradient`, made of the same and of
            `scatter`. If not, the kernel's gradients are formed by the blocks of `scan`.
    """

    passes: ClassVar[int] = 1
    in_tiles: ClassVar[bool] = False
    gradient_in_tiles: ClassVar[bool] = False

    @abc.abstractmethod
    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        """The state before the first block, in the dtype of the sums."""

    @abc.abstractmethod
    def absorb(self, state: Any, block: LogitBlock, passed: Any) -> Any:
        """The state after one more block."""

    @abc.abstractmethod
    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        """The combined state of all shards of the vocabulary."""

    @abc.abstractmethod
    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        """Outputs, and the residuals that the next pass or `gradient` reads."""

    @abc.abstractmethod
    def gradient(self, residuals: Any, cotangents: Any, block: LogitBlock) -> jax.Array:
        """Gradient by `block.student`, given the gradient by the outputs: `[*batch, block]`."""

    def losses(self, outputs: Any, tokens: Any) -> Any:
        """Pick the losses that `run` returns; with weights one per position, `[*batch]`."""
        return outputs


class OnlineSums(NamedTuple):
    """Sums weighted by `exp(logits)`, relative to the largest logit seen so far.

    peak: `[*batch]`, the largest logit.
        sums: `[*batch]` each, divided by `exp(peak)`: the plain sum first, then one per term.
        sums: `[*batch]` each, over `exp(peak)`: the plain sum first, then one a term.
    """

    peak: jax.Array
    sums: tuple[jax.Array, ...]

    @classmethod
    def start(cls, batch: tuple[int, ...], dtype: Any, *, terms: int = 0) -> "OnlineSums":
        """Empty sums for the normaliser and this many weighted terms."""
        # Not -inf, whose difference with itself would be nan.
        peak = jnp.full(batch, jnp.finfo(dtype).min, dtype)
        return cls(peak, tuple(jnp.zeros(batch, dtype) for _ in range(1 + terms)))

    def raised(self, logits: jax.Array) -> jax.Array:
        """The peak after one more block."""
        return jnp.maximum(self.peak, logits.max(-1))

    def add(self, logits: jax.Array, *terms: jax.Array) -> "OnlineSums":
        """Add one more block; `terms` have the shape of its logits and must be finite."""
        peak = self.raised(logits)
        weights = jnp.exp(logits - peak[..., None])
        news = [weights, *(weights * term for term in terms)]
        old = self._rescaled(peak)
        return OnlineSums(peak, tuple(s + new.sum(-1) for s, new in zip(old, news)))

    def reduce(self, axis_name: AxisName) -> "OnlineSums":
        """Combine all shards."""
        # The sums do not depend on the peak, so it needs no second derivatives.
        peak = lax.pmax(lax.stop_gradient(self.peak), axis_name)
        sums = lax.psum(jnp.stack(self._rescaled(peak)), axis_name)
        return OnlineSums(peak, tuple(sums))

    def _rescaled(self, peak: jax.Array) -> list[jax.Array]:
        scale = jnp.exp(self.peak - peak)
        return [s * scale for s in self.sums]

    @property
    def log_sum(self) -> jax.Array:
        """The log-normaliser; `-inf` if no entry exists."""
        return self.peak + jnp.log(self.sums[0])

    @property
    def log_z(self) -> jax.Array:
        """`log_sum`, but zero if no entry exists: subtracted from logits."""
        return ops.neginf_to_zero(self.log_sum)
