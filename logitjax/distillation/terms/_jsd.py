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
        beta: Share of the teacher in the mixture; 0 for KL(teacher || student), 1 for the reverse.
        normalize: Divide by `beta (1 - beta)`, see `FullJSD`.
    """

    beta: float = 0.5
    normalize: bool = False
    name = "jsd"

    def whole(self, student: losses.Readout, teacher: Any) -> jax.Array:
        log_probs = with_rest(student.gathered, student.log_z)
        return self.renormalised(log_probs, with_rest(teacher.top.values, teacher.top.log_z))

    def renormalised(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        # 0 at the ends: plain KL.
        scale = self.beta * (1 - self.beta) if self.normalize else 0.0
        value = losses.generalized_jensen_shannon(student, teacher, beta=self.beta)
        return value / scale if scale else value
