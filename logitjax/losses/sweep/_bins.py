"""Exact top-k of a sweep without a sort: the best few of each of many bins, and a certificate.

Column `v` belongs to bin `v mod bins`, and each bin keeps its `depth` best, by comparisons alone.
The `k` largest of these are the `k` largest of the vocabulary unless some bin had to drop one of
them, that is, unless the smallest value that a bin keeps reaches the k-th largest. Such rows are
read again, with a sort. For logits in random order that is one row in two hundred at k = 64.

References:
    Samaga et al., Faster approx. top-k: harnessing the full power of two stages, 2025 (arXiv
    2506.04165), for the bins; the certificate is ours.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.losses.sweep._engine import Operands, Sweep, swept
from logitjax.losses.sweep._readout import ReadoutStatistic
from logitjax.losses.sweep._statistic import LogitBlock, Statistic

DEPTH = 4
# Eight bins per requested value, in whole rows of lanes.
_LEAST_BINS, _BINS_A_VALUE, _LANES = 512, 8, 128
# Up to 1 in 16 rows are read again by themselves; if there are more, all rows are.
_REREAD = 16


class _State(NamedTuple):
    # State of the statistic without its k.
    rest: Any
    values: jax.Array  # [*batch, depth * bins], the best of all bins first
    ids: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binned(Statistic):
    """Sums by bins, in place of a `ReadoutStatistic` with `k`, for kernels."""

    rest: ReadoutStatistic  # without its k
    # A multiple of 128; the columns of a block are a multiple of it.
    bins: int

    @classmethod
    def of(cls, statistic: ReadoutStatistic) -> "Binned":
        """Build it with enough bins for the statistic's k."""
        bins = max(_LEAST_BINS, -(-_BINS_A_VALUE * statistic.k // _LANES) * _LANES)
        return cls(rest=dataclasses.replace(statistic, k=0), bins=bins)

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> _State:
        kept = (*batch, DEPTH * self.bins)
        return _State(
            self.rest.start(batch, dtype, passed),
            jnp.full(kept, -jnp.inf, dtype),
            jnp.zeros(kept, jnp.int32),
        )

    def absorb(self, state: _State, block: LogitBlock, passed: Any) -> _State:
        levels = range(0, DEPTH * self.bins, self.bins)
        values, ids = (
            [x[..., at : at + self.bins] for at in levels] for x in (state.values, state.ids)
        )
        for at in range(0, block.student.shape[-1], self.bins):
            value = block.student[..., at : at + self.bins]
            id_ = jnp.broadcast_to(block.columns[..., at : at + self.bins], value.shape)
            # Columns come in order, so the first of equal values stays on top, as in `lax.top_k`.
            # Inserting a value moves those below it down.
            moves = jnp.zeros(value.shape, jnp.bool_)
            for level in range(DEPTH):
                moves = moves | (value > values[level])
                values[level], value = (
                    jnp.where(moves, value, values[level]),
                    jnp.where(moves, values[level], value),
                )
                ids[level], id_ = (
                    jnp.where(moves, id_, ids[level]),
                    jnp.where(moves, ids[level], id_),
                )
        rest = self.rest.absorb(state.rest, block, passed)
        return _State(rest, jnp.concatenate(values, -1), jnp.concatenate(ids, -1))

    def _settled(self, *arguments: Any) -> Any:
        raise NotImplementedError("the statistic that this replaces does this after `settle`")

    reduce = finish = gradient = _settled  # type: ignore


def settle(sweep: Sweep, operands: Operands, binned: Binned, state: _State) -> Any:
    """The statistic's state for these columns, with the k largest certified or read again."""
    statistic = sweep.statistic
    assert isinstance(statistic, ReadoutStatistic)
    k = statistic.k
    first_id = 0
    if sweep.axis_name is not None:
        first_id = lax.axis_index(sweep.axis_name) * operands.student.head.vocab_size()
    only_k = dataclasses.replace(
        sweep, statistic=ReadoutStatistic(k=k), token_block=None, axis_name=None, forward=None
    )

    def sorted_(some: Operands) -> tuple[jax.Array, jax.Array]:
        result, _ = swept(only_k, some._replace(teacher=None, tokens={}))
        return result.values, result.indices + first_id

    negative, ids = lax.sort((-state.values, state.ids), num_keys=2)
    values, ids = -negative[:, :k], ids[:, :k]
    last = state.values[:, -binned.bins :]
    unsure = ((last >= values[:, -1:]) & (last != -jnp.inf)).any(-1)
    # Comparisons drop nan, which a sort puts first.
    unsure |= jnp.isnan(state.rest.sums.sums[0])
    most = -(-len(unsure) // _REREAD)

    def reread(top: Any) -> Any:
        (rows,) = jnp.nonzero(unsure, size=most, fill_value=len(unsure))
        hidden = jnp.asarray(operands.student.hidden).at[rows].get(mode="clip")
        student = operands.student._replace(hidden=hidden)
        again = sorted_(operands._replace(student=student))
        return tuple(x.at[rows].set(y, mode="drop") for x, y in zip(top, again, strict=True))

    count = unsure.sum()
    which = (count > 0).astype(jnp.int32) + (count > most)
    values, ids = lax.switch(
        which, [lambda top: top, reread, lambda _: sorted_(operands)], (values, ids)
    )
    return state.rest._replace(values=values, indices=ids)
