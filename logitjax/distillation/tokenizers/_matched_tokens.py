import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from logitjax import losses
from logitjax.distillation.tokenizers._projection import TokenProjection
from logitjax.ops import TopK
from logitjax.ops import mesh as on_mesh

_LEAST_MASS = 2.0**-24


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """One-to-one matches: student token of each teacher token (-1: none), and a mask of matches."""

    ours: Any
    matched: Any

    @classmethod
    def of(cls, projection: TokenProjection) -> "Matches":
        """Matches of a projection with the rule `exact`; the lowest id of several counts."""
        only = projection.only
        student_ids = np.full(projection.size, -1, np.int32)
        # In reverse, so that the lowest id is written last.
        for id_ in np.flatnonzero(only >= 0)[::-1]:
            student_ids[only[id_]] = id_
        matched = np.zeros(len(only), bool)
        matched[student_ids[student_ids >= 0]] = True
        return cls(ours=student_ids, matched=matched)

    def ids(self, teacher_ids: Any) -> tuple[jax.Array, jax.Array]:
        """Return student ids for teacher ids, and a mask of those that exist."""
        result = _entries(self.ours, teacher_ids, -1)
        return jnp.maximum(result, 0), result >= 0


def hybrid_logit_distance(
    student: losses.Readout,
    student_top: TopK,
    teacher: TopK,
    matches: Matches,
    *,
    kind: Literal["jsd", "kl"] = "jsd",
    beta: float = 0.5,
) -> tuple[Float[jax.Array, "*batch"], Float[jax.Array, "*batch"]]:
    """GOLD's hybrid loss or X-Token's H-KL, from top logits: the matched and the sorted part.

    The matched part compares the tokens of the teacher's top k that the student has, and a single
    bucket for all others::

        matched  JSD_beta(p, q)  or  KL(p || q),  over matched tokens and the bucket
        sorted   sum_r |p_(r) - q_(r)|  over the unmatched of either side's top k, largest first

    The bucket makes the first part a divergence: it is 0 where both models agree, and its gradient
    does not push unmatched tokens down. No mass is renormalised, so the parts need no weights.
    `student` is at `matches.ids(teacher.indices)`, and `student_top` the student's own top logits.

    References:
        TRL, GOLD trainer; X-Token (arXiv 2605.21699), H-KL.
    """
    teacher = jax.lax.stop_gradient(teacher)
    _, present = matches.ids(teacher.indices)
    log_q = jnp.where(present, student.gathered - student.log_z[..., None], -jnp.inf)
    # `log_q` is normalised already.
    log_z = jnp.zeros_like(teacher.log_z)
    top_k = TopK(jnp.where(present, teacher.values, -jnp.inf), teacher.indices, teacher.log_z)
    if kind == "kl":
        matched = losses.sparse_kl_divergence(losses.Readout(log_z, gathered=log_q), top_k)
    else:
        matched = losses.generalized_jensen_shannon(
            with_rest(log_q, log_z), with_rest(top_k.values, top_k.log_z), beta=beta
        )
    p = jnp.where(
        present, 0.0, jnp.exp(teacher.values - teacher.log_z[..., None])
    )  # unmatched ones
    is_matched = _entries(matches.matched, student_top.indices, False)
    q = jnp.where(is_matched, 0.0, jnp.exp(student_top.values - student_top.log_z[..., None]))
    size = max(p.shape[-1], q.shape[-1])
    p, q = (
        jnp.pad(
            jnp.sort(x, axis=-1, descending=True),
            [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])],
        )
        for x in (p, q)
    )
    return matched, jnp.abs(p - q).sum(-1)


def _entries(table: np.ndarray, ids: Any, beyond: Any) -> jax.Array:
    """Look up ids in a table, and `beyond` for padded columns of the head."""

    def entries(ids: jax.Array) -> tuple[jax.Array]:
        result = jnp.asarray(table)[jnp.minimum(ids, len(table) - 1)]
        return (jnp.where(ids < len(table), result, beyond),)

    ids = jnp.asarray(ids)
    return on_mesh.over_batch(entries, (ids.ndim,), ids)[0]


def with_rest(logits: jax.Array, log_z: jax.Array) -> jax.Array:
    """Log-probabilities of the kept tokens and, as the last entry, of all others together."""
    existing = logits - log_z[..., None]
    # The smallest mass that 1 - sum(p) resolves in float32.
    rest = jnp.maximum(1.0 - jnp.exp(existing).sum(-1, keepdims=True), _LEAST_MASS)
    return jnp.concatenate([existing, jnp.log(rest)], axis=-1)
