import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from logitjax import losses
from logitjax.distillation._term import StudentNeeds, TeacherNeeds
from logitjax.distillation.terms._sparse import SparseDivergence


@dataclasses.dataclass(frozen=True, kw_only=True)
class KL(SparseDivergence):
    """KL(teacher || student); samples of the tail make its estimate unbiased."""

    name = "kl"
    teacher = TeacherNeeds(top_k=1, rest=False, tail=True, same_vocabulary=True)
    direction: ClassVar[Literal["forward", "reverse"]] = "forward"

    def student(self, teacher: Any) -> StudentNeeds:
        ids = teacher.top.indices
        if teacher.tail is not None:
            # `[*batch, k + draws]`.
            ids = jnp.concatenate([ids, teacher.tail.indices], axis=-1)
        return StudentNeeds(ids=ids)

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        # Samples were drawn at temperature 1 and are of no use at another.
        if teacher.tail is not None and self.temperature == 1.0:
            options: dict[str, Any] = dict(direction=self.direction, tail=teacher.tail)
            return losses.sparse_kl_divergence(read.top, teacher.top, **options)
        return super().value(read, teacher, batch, params)

    def whole(self, student: losses.Readout, teacher: Any) -> jax.Array:
        return losses.sparse_kl_divergence(student, teacher.top, direction=self.direction)

    def renormalised(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        return losses.kl_divergence(student, teacher, direction=self.direction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseKL(KL):
    """KL(student || teacher); samples of the tail make its estimate unbiased."""

    name = "rkl"
    direction = "reverse"
