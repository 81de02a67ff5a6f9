"""Statistics of a sweep: the interface, and building blocks of most statistics."""

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax import ops
from logitjax.losses.sweep import _ids
from logitjax.ops import Array, AxisName


class LogitBlock(NamedTuple):
    """Logits of some positions at some columns of the vocabulary, divided by the temperature.

    Attributes:
        student: `[*batch, block]`, float32; `-inf` where a column does not count, for example
            because an earlier block had it.
        teacher: the same for the teacher; None without one.
        columns: `[block]` int32, ids in the whole vocabulary; in a kernel `[1, block]`, negative
            past the end of the vocabulary.
        first: index of the first column that no earlier block had.
        tokens: the arrays given to `run`, `[*batch, ...]`.
        together: number of ids of a position that are searched at a time by comparison, on devices
            with slow gathers and scatters; 0 where these are fast, as on a CPU.
    """

    student: jax.Array
    teacher: jax.Array | None
    columns: jax.Array
    first: jax.Array | int
    tokens: Any
    together: int = 0

    def is_at(self, ids: Array) -> jax.Array:
        """Compare columns with one id per position: boolean `[*batch, block]`."""
        present = self.columns == jnp.asarray(ids)[..., None]
        if isinstance(self.first, int) and self.first == 0:
            return present
        return present & (jnp.arange(self.columns.size) >= self.first)

    def gather(self, ids: Array) -> jax.Array:
        """Return the student's logits at `ids`, `[*batch, n]`; zero for ids of other blocks."""
        if self.together:
            return _ids.pick(self.together, self.student, self._new_columns(), _as_int32(ids))
        places, inside = self._places(ids)
        return jnp.where(inside, jnp.take_along_axis(self.student, places, axis=-1), 0.0)

    def scatter(self, total: jax.Array, ids: Array, values: jax.Array) -> jax.Array:
        """Add `values` at `ids`, both `[*batch, n]`, to `total`, `[*batch, block]`."""
        if self.together:
            # Into zeros, because the total would have to be written out first.
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
        """Indices of ids in the block (clipped), and whether they are in the block."""
        places = jnp.asarray(ids) - self.columns[0]
        inside = (places >= self.first) & (places < self.columns.size)
        return jnp.clip(places, 0, self.columns.size - 1), inside


def _as_int32(ids: Array) -> jax.Array:
    return jnp.asarray(ids).astype(jnp.int32)


class Statistic(abc.ABC):
    """A few numbers per position that are summed over the vocabulary, and their gradient.

    A statistic is hashable and holds no arrays (ideally a frozen dataclass), because it is a static
    argument of the sweep. Every array of its state and of its results starts with the batch shape,
    and positions must be independent, because a sweep may cut them into blocks.

    A statistic with more than one pass over the vocabulary starts again in each; `passed` has the
    residuals of the previous pass, None in the first.

    Attributes:
        passes: number of passes over the vocabulary.
        in_tiles: whether a kernel can run `start` and `absorb` on what is on chip. They must
            consist of elementwise operations, comparisons, `LogitBlock.gather`, and sums and maxima
            over the last axis (no sort, no other gather).
        gradient_in_tiles: whether a kernel can run `gradient` too, consisting of the same and of
            `scatter`. If not, gradients are formed by the blocks of `scan`.
    """

    passes: ClassVar[int] = 1
    in_tiles: ClassVar[bool] = False
    gradient_in_tiles: ClassVar[bool] = False

    @abc.abstractmethod
    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        """Return the state before the first block, in the dtype of the sums."""

    @abc.abstractmethod
    def absorb(self, state: Any, block: LogitBlock, passed: Any) -> Any:
        """Return the state after one more block."""

    @abc.abstractmethod
    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        """Combine the states of all shards of the vocabulary."""

    @abc.abstractmethod
    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        """Return outputs, and residuals for the next pass or for `gradient`."""

    @abc.abstractmethod
    def gradient(self, residuals: Any, cotangents: Any, block: LogitBlock) -> jax.Array:
        """Return the gradient of `block.student`, `[*batch, block]`, given that of the outputs."""

    def losses(self, outputs: Any, tokens: Any) -> Any:
        """Return what `run` returns; with weights, a loss per position, `[*batch]`."""
        return outputs


class OnlineSums(NamedTuple):
    """Sums weighted by `exp(logits)`, relative to the largest logit seen so far.

    Attributes:
        peak: `[*batch]`, the largest logit.
        sums: `[*batch]` each, divided by `exp(peak)`: the plain sum, then one for each term.
    """

    peak: jax.Array
    sums: tuple[jax.Array, ...]

    @classmethod
    def start(cls, batch: tuple[int, ...], dtype: Any, *, terms: int = 0) -> "OnlineSums":
        """Return empty sums for the normaliser and for `terms` weighted terms."""
        # Not -inf, because -inf - -inf is nan.
        peak = jnp.full(batch, jnp.finfo(dtype).min, dtype)
        return cls(peak, tuple(jnp.zeros(batch, dtype) for _ in range(1 + terms)))

    def raised(self, logits: jax.Array) -> jax.Array:
        """Return the peak after one more block."""
        return jnp.maximum(self.peak, logits.max(-1))

    def add(self, logits: jax.Array, *terms: jax.Array) -> "OnlineSums":
        """Add a block; `terms` have the shape of its logits and must be finite."""
        peak = self.raised(logits)
        weights = jnp.exp(logits - peak[..., None])
        news = [weights, *(weights * term for term in terms)]
        old = self._rescaled(peak)
        return OnlineSums(peak, tuple(s + new.sum(-1) for s, new in zip(old, news)))

    def reduce(self, axis_name: AxisName) -> "OnlineSums":
        """Combine the sums of all shards."""
        # Results do not depend on the peak, so second derivatives need none of the maximum.
        peak = lax.pmax(lax.stop_gradient(self.peak), axis_name)
        sums = lax.psum(jnp.stack(self._rescaled(peak)), axis_name)
        return OnlineSums(peak, tuple(sums))

    def _rescaled(self, peak: jax.Array) -> list[jax.Array]:
        scale = jnp.exp(self.peak - peak)
        return [s * scale for s in self.sums]

    @property
    def log_sum(self) -> jax.Array:
        """The log-normaliser; `-inf` if no entry is valid."""
        return self.peak + jnp.log(self.sums[0])

    @property
    def log_z(self) -> jax.Array:
        """`log_sum` to subtract from logits: zero if no entry is valid."""
        return ops.neginf_to_zero(self.log_sum)
