import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from logitjax.distillation._binary_kl import binary_kl_norm
from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term
from logitjax.losses import Head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dual(Term):
    """BinaryKL-Norm of dual-head distillation, on a second head that starts as a copy."""

    name = "dual"
    teacher = TeacherNeeds(top_k=1, rest=False, same_vocabulary=True)
    pointwise = False

    def init(self, key: jax.Array, head: Head) -> Any:
        # A copy, because both heads train.
        return {"head": {"kernel": jnp.array(head.rows.T)}}

    def own_head(self, params: Any) -> Head:
        return Head(params["head"]["kernel"], vocab_axis=1)

    def student(self, teacher: Any) -> StudentNeeds:
        return StudentNeeds(ids=teacher.top.indices)

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        return binary_kl_norm(read.gathered, teacher.top.values, reduction="mean")
