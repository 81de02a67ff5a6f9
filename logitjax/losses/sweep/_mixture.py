import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.losses.sweep._statistic import LogitBlock, OnlineSums, Statistic
from logitjax.ops import AxisName


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureStatistic(Statistic):
    """Divergences of teacher `p` and student `q` from their mixture, in two passes.

    ::

        m = beta p + (1 - beta) q
        weights[0] KL(p || m) + weights[1] KL(q || m)

    Attributes:
        beta: The teacher's share, between 0 and 1.
        weights: `(beta, 1 - beta)` gives the generalised Jensen-Shannon divergence, `(1, 0)` and
            `(0, 1)` the two skew KL divergences.
        fixed: Whether the gradient treats the mixture as a constant.
    """

    passes: ClassVar[int] = 2
    beta: float
    weights: tuple[float, float]
    fixed: bool = False

    in_tiles = gradient_in_tiles = True

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        if passed is not None:
            return jnp.zeros(batch, dtype), jnp.zeros(batch, dtype)
        return (OnlineSums.start(batch, dtype),) * 2

    def absorb(self, state: Any, block: LogitBlock, passed: Any) -> Any:
        if passed is None:
            return state[0].add(block.student), state[1].add(block.teacher)
        terms = self._terms(*self._log_probabilities(block, passed))
        return tuple(total + term.sum(-1) for total, term in zip(state, terms))

    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        if passed is not None:
            return tuple(lax.psum(jnp.stack(state), axis_name))
        return tuple(side.reduce(axis_name) for side in state)

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        if passed is None:
            return None, tuple(side.log_z for side in state)
        return state[0], (*passed, state[1])

    def gradient(self, residuals: Any, cotangents: Any, block: LogitBlock) -> jax.Array:
        *log_zs, slope_sum = residuals
        log_q, log_p = self._log_probabilities(block, log_zs)
        # log q = s - log Z: a logit changes its own term and, through Z, every term by q.
        slope = self._terms(log_q, log_p)[1]
        return cotangents[..., None] * (slope - jnp.exp(log_q) * slope_sum[..., None])

    def _log_probabilities(self, block: LogitBlock, log_zs: Any) -> tuple[jax.Array, jax.Array]:
        assert block.teacher is not None
        return block.student - log_zs[0][..., None], block.teacher - log_zs[1][..., None]

    def _terms(self, log_q: jax.Array, log_p: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Summand of each column, and its derivative by the student's log-probability."""
        # If neither has an entry, any number but -inf, whose derivatives are nan, will do.
        exists = (log_q != -jnp.inf) | (log_p != -jnp.inf)
        shares = (log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
        log_m = jnp.logaddexp(*(jnp.where(exists, share, 0.0) for share in shares))

        def part(log_prob: jax.Array) -> jax.Array:
            # Mask before the product, whose derivative is nan at -inf.
            gap = jnp.where(log_prob != -jnp.inf, log_prob - log_m, 0.0)
            return jnp.exp(log_prob) * gap

        p_weight, q_weight = self.weights
        q_part, p_part = q_weight * part(log_q), p_weight * part(log_p)
        # The mixture depends on the student; this cancels for Jensen-Shannon weights.
        moved = 0.0 if self.fixed else q_weight * self.beta - p_weight * (1 - self.beta)
        slope = q_part + moved * jnp.exp(log_p + log_q - log_m) if moved else q_part
        return p_part + q_part, slope
