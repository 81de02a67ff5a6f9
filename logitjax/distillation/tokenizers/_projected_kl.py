import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax import losses
from logitjax.distillation.tokenizers._projection import Members, TokenProjection
from logitjax.losses import Blocks, sweep
from logitjax.ops import AxisName, TopK
from logitjax.ops import mesh as on_mesh

# Up to so many student logits per position are gathered; beyond that, sums over the whole
# vocabulary are cheaper.
MOST_MEMBERS = 4096
_LEAST = 1e-37


def project_top_k(
    student: losses.Readout, teacher: TopK, members: Members
) -> tuple[losses.Readout, TopK]:
    """Project both models on the teacher's top k, `[*batch, k]`, for `sparse_kl_divergence`.

    ::

        q'_i = sum_{s: slot(s) = i} w_s q_s,   p'_i of `TokenProjection.merged`

    The student's read-out is at `members.ids`, `[*batch, m]`. One bucket holds everything outside
    the top k, and tokens without a match, for which both sides are `-inf`. With the rule
    `first_piece`, this is sound wherever both models have read the same text: `q'_j` and `p'_j` are
    the probabilities that the text goes on with token j, which both have.

    References:
        P-KL of X-Token (arXiv 2605.21699), where W spreads each token over its pieces, the teacher
        of a chunk is a mean of logarithms, and both are renormalised over 8192 columns.
    """
    k = teacher.values.shape[-1]
    log_q = jnp.where(members.slots < k, student.gathered - student.log_z[..., None], -jnp.inf)

    def sums(log_q: jax.Array, slots: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        zeros = jnp.zeros((*slots.shape[:-1], k + 1), log_q.dtype)
        masses = (weights * jnp.exp(log_q), weights)
        return tuple(zeros.at[_rows(slots)].add(mass)[..., :-1] for mass in masses)

    parts = log_q, members.slots, members.weights
    masses, stored = on_mesh.over_batch(sums, (log_q.ndim,) * 2, *parts)
    return _in_theirs(masses, stored > 0, teacher)


def _in_theirs(masses: jax.Array, covered: jax.Array, teacher: TopK) -> tuple[losses.Readout, TopK]:
    log_q = jnp.where(covered, jnp.log(jnp.maximum(masses, _LEAST)), -jnp.inf)
    values = jnp.where(covered, teacher.values, -jnp.inf)
    return (
        losses.Readout(jnp.zeros_like(teacher.log_z), gathered=log_q),
        TopK(values, teacher.indices, teacher.log_z),
    )


def bucket_sums(teacher: TopK, projection: TokenProjection) -> tuple[sweep.Statistic, Any, Blocks]:
    """Statistic of sums over whole rows, its tokens and blocks; takes a byte per entry."""
    teacher = projection.merged(teacher)
    statistic = _BucketSums(projection=projection, k=teacher.indices.shape[-1])
    tokens = {"teacher": teacher, "slots": _slots(teacher.indices, projection.size)}
    # Whole rows of logits would take most of the memory that this saves.
    return statistic, tokens, Blocks(engine="scan")


def _slots(ids: jax.Array, size: int) -> jax.Array:
    """Index of each teacher token among the k `ids`, `[*batch, size + 1]`; k for none."""
    k = ids.shape[-1]
    small = jnp.uint8 if k < 1 << 8 else jnp.int32
    table = jnp.full((*ids.shape[:-1], size + 1), k, small)
    numbers = lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1)
    # Logits beyond the tokenizer belong to no token.
    return table.at[_rows(ids)].set(numbers.astype(small), mode="drop").at[..., size].set(k)


def _rows(ids: jax.Array) -> tuple[jax.Array, ...]:
    """Index arrays that select `ids` along the last axis of an array with the same other axes."""
    batch = (lax.broadcasted_iota(jnp.int32, ids.shape, a) for a in range(ids.ndim - 1))
    return (*batch, ids)


class _Masses(NamedTuple):
    log_z: Any
    masses: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BucketSums(sweep.Statistic):
    """The student's mass at each of the teacher's top k, summed over all of its tokens."""

    projection: TokenProjection
    k: int

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        return sweep.OnlineSums.start(batch, dtype), jnp.zeros((*batch, self.k), dtype)

    def absorb(self, state: Any, block: sweep.LogitBlock, passed: Any) -> Any:
        sums, masses = state
        new = sums.add(block.student)
        mass = jnp.exp(block.student - new.peak[..., None])
        expected = block.tokens["teacher"].indices
        result = jnp.zeros_like(masses)
        for ids, weights in self._columns(block):
            ordered = jnp.sort(ids)
            location = jnp.searchsorted(ordered, ids)
            columns = jnp.moveaxis(mass * weights, -1, 0)
            table = jax.ops.segment_sum(columns, location, num_segments=len(ids))
            at = jnp.minimum(jnp.searchsorted(ordered, expected), len(ids) - 1)
            # Most ids are in other blocks; index 0 keeps their reads within one cache line.
            here = ordered[at] == expected
            at = jnp.where(here, at, 0)
            result += jnp.where(here, table[(at, *_rows(at)[:-1])], 0.0)
        return new, masses * jnp.exp(sums.peak - new.peak)[..., None] + result

    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        sums, masses = state
        new = sums.reduce(axis_name)
        scale = jnp.exp(sums.peak - new.peak)[..., None]
        return new, lax.psum(masses * scale, axis_name)

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        sums, masses = state
        out = _Masses(sums.log_sum, masses / jnp.maximum(sums.sums[0], 1e-30)[..., None])
        return out, out

    def gradient(self, residuals: Any, cotangents: Any, block: sweep.LogitBlock) -> jax.Array:
        log_z, masses = residuals
        q = jnp.exp(block.student - jnp.where(log_z == -jnp.inf, 0.0, log_z)[..., None])
        slots = block.tokens["slots"]
        array = jnp.concatenate([cotangents.masses, jnp.zeros_like(log_z)[..., None]], axis=-1)
        slope = cotangents.log_z - (cotangents.masses * masses).sum(-1)
        slope = slope[..., None] + sum(
            jnp.take_along_axis(array, slots[..., ids].astype(jnp.int32), axis=-1) * weights
            for ids, weights in self._columns(block)
        )
        return q * slope

    def losses(self, outputs: Any, tokens: Any) -> jax.Array:
        teacher = tokens["teacher"]
        size = self.projection.size
        # A model may have more logits than its tokenizer tokens.
        stored = jnp.asarray(self.projection.sizes > 0)[jnp.minimum(teacher.indices, size - 1)]
        stored = stored & (teacher.indices < size)
        return losses.sparse_kl_divergence(*_in_theirs(outputs.masses, stored, teacher))

    def _columns(self, block: sweep.LogitBlock) -> list[tuple[jax.Array, jax.Array]]:
        """Teacher tokens and weights of the block's columns, for each entry of a row of W."""
        size = self.projection.size
        # The head may have more columns than the tokenizer tokens.
        at = jnp.minimum(block.columns, len(self.projection.ids) - 1)
        present = block.columns < len(self.projection.ids)
        out = []
        for r in range(self.projection.ids.shape[1]):
            ids = jnp.asarray(self.projection.ids[:, r])[at]
            available = present & (ids >= 0)
            weights = jnp.where(available, jnp.asarray(self.projection.weights[:, r])[at], 0.0)
            out.append((jnp.where(available, ids, size), weights))
        return out
