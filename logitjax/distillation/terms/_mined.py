"""KL by the nearest spelling, and cross-entropy where tokens do not meet (MinED)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from logitjax import losses, ops
from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term
from logitjax.distillation.tokenizers._projected_kl import MOST_MEMBERS
from logitjax.distillation.tokenizers._projection import Members


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinED(Term):
    """KL by the nearest spelling, cross-entropy where tokens do not meet (MinED)."""

    name = "mined"
    teacher = TeacherNeeds(top_k=1, projection="edit_distance")

    def student(self, teacher: Any) -> StudentNeeds:
        projection = teacher.vocabularies.projections["edit_distance"]
        top = teacher.top
        if (members := projection.capacity(top.values.shape[-1])) > MOST_MEMBERS:
            raise ValueError(
                "loss 'mined': expected a student of a smaller vocabulary than its teacher's, got "
                f"{members} tokens for its top {top.values.shape[-1]}; use first_piece"
            )
        members = projection.members(projection.merged(top).indices)
        return StudentNeeds(label=True, ids=members.ids, beside=members)

    def labels_seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        return teacher.single

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        kl = losses.sparse_kl_divergence(*_nearest(read.top, teacher.top, read.beside))
        return jnp.where(teacher.single, kl, read.cross_entropy)


def _nearest(
    student: losses.Readout, teacher: ops.TopK, members: Members
) -> tuple[losses.Readout, ops.TopK]:
    """Each of our tokens with the logit of the nearest of theirs; what is left is a rest."""
    there = members.slots < teacher.values.shape[-1]
    # Empty slots hold our token 0, whose mass would be taken from our rest once for each of them.
    ours = student._replace(gathered=jnp.where(there, student.gathered, -jnp.inf))
    at = jnp.minimum(members.slots, teacher.values.shape[-1] - 1)
    values = jnp.where(there, ops.gather_at(teacher.values, at), -jnp.inf)
    log_p = values - teacher.log_z[..., None]
    top = jnp.exp(teacher.values - teacher.log_z[..., None]).sum(-1)
    # A token that several of ours share counts for each of them.
    total = jnp.exp(log_p).sum(-1) + jnp.maximum(1.0 - top, 0.0)
    return ours, ops.TopK(log_p, members.ids, jnp.log(jnp.maximum(total, 1e-30)))
