"""Divergence and acceptance of drafts from a part of the vocabulary, in one statistic."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.losses.sweep import LogitBlock, OnlineSums, Statistic
from logitjax.ops import AxisName


class DraftReading(NamedTuple):
    """A draft's distribution q beside the model's p, of which only the draft's tokens are known.

    Attributes:
        kl: `[*batch]` KL(p~ || q), with p~ = p normalised over the draft's tokens.
        acceptance: `[*batch]` sum of min(p, q): the probability that the draft is accepted.
        best: `[*batch]` int32 the draft's most likely token, by its place in q.
    """

    kl: jax.Array
    acceptance: jax.Array
    best: jax.Array


@dataclasses.dataclass(frozen=True)
class DraftStatistic(Statistic):
    """The `DraftReading` of a head and a teacher with the same columns, a part of a vocabulary.

    `tokens["log_z"]` is the teacher's log-normaliser over its *whole* vocabulary.

    References:
        LK losses (arXiv 2602.23881); the gradient of the acceptance is
        q_j (1[q_j < p_j] - sum_{i: q_i < p_i} q_i).
    """

    passes: ClassVar[int] = 2

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        if passed is not None:
            return (jnp.zeros(batch, dtype),) * 3
        top = jnp.full(batch, -jnp.inf, dtype), jnp.zeros(batch, jnp.int32)
        return (OnlineSums.start(batch, dtype),) * 2, top

    def absorb(self, state: Any, block: LogitBlock, passed: Any) -> Any:
        z = block.student
        if passed is None:
            (ours, teacher), (most, best) = state
            column = block.columns[z.argmax(axis=-1)]
            top = jnp.maximum(most, z.max(axis=-1)), jnp.where(z.max(axis=-1) > most, column, best)
            return (ours.add(z), teacher.add(block.teacher)), top
        log_q, log_p, p = self._log_probabilities(passed, block)
        gap = jnp.where(log_p > -jnp.inf, log_p - log_q, 0.0)
        q = jnp.exp(log_q)
        terms = jnp.exp(log_p) * gap, jnp.minimum(p, q), jnp.where(q < p, q, 0.0)
        return tuple(total + term.sum(axis=-1) for total, term in zip(state, terms, strict=True))

    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        if passed is not None:
            return tuple(lax.psum(part, axis_name) for part in state)
        sums, (most, best) = state
        largest = lax.pmax(most, axis_name)
        places = jnp.where(most == largest, best, jnp.iinfo(jnp.int32).max)
        reduced = tuple(side.reduce(axis_name) for side in sums)
        return reduced, (largest, lax.pmin(places, axis_name))

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        if passed is None:
            sums, (_, best) = state
            return None, (*(side.log_z for side in sums), best)
        kl, acceptance, below = state
        return DraftReading(kl, acceptance, passed[2]), (*passed[:2], below)

    def gradient(self, residuals: Any, cotangents: Any, block: LogitBlock) -> jax.Array:
        log_q, log_p, p = self._log_probabilities(residuals, block)
        q, below = jnp.exp(log_q), residuals[2][..., None]
        of_acceptance = q * ((q < p) - below)
        of_kl = q - jnp.exp(log_p)
        return cotangents.kl[..., None] * of_kl + cotangents.acceptance[..., None] * of_acceptance

    def _log_probabilities(self, passed: Any, block: LogitBlock) -> tuple[jax.Array, ...]:
        """log q, log p~ and p."""
        assert block.teacher is not None
        log_q, log_p = block.student - passed[0][..., None], block.teacher - passed[1][..., None]
        return log_q, log_p, jnp.exp(block.teacher - block.tokens["log_z"][..., None])
