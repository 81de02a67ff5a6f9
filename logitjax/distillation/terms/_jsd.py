"""The generalised Jensen-Shannon divergence from cached top logits."""

import dataclasses
from typing import Any

import jax

from logitjax import losses
from logitjax.distillation.terms._sparse import SparseDivergence
from logitjax.distillation.tokenizers._matched_tokens import with_rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class JSD(SparseDivergence):
    """Generalised Jensen-Shannon divergence.

    Attributes:
        beta: Share of the teacher in the mixture.
    """

    beta: float = 0.5
    name = "jsd"

    def whole(self, student: losses.Readout, teacher: Any) -> jax.Array:
        ours = with_rest(student.gathered, student.log_z)
        theirs = with_rest(teacher.top.values, teacher.top.log_z)
        return losses.generalized_jensen_shannon(ours, theirs, beta=self.beta)

    def renormalised(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        return losses.generalized_jensen_shannon(student, teacher, beta=self.beta)
