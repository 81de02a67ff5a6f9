"""KL(student || teacher) from cached top logits."""

import dataclasses
from typing import Any

import jax

from logitjax import losses
from logitjax.distillation.terms._sparse import SparseDivergence


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseKL(SparseDivergence):
    """KL(student || teacher)."""

    name = "rkl"

    def whole(self, student: losses.Readout, teacher: Any) -> jax.Array:
        return losses.sparse_kl_divergence(student, teacher.top, direction="reverse")

    def renormalised(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        return losses.kl_divergence(student, teacher, direction="reverse")
