import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from logitjax import losses
from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseDivergence(Term):
    """A divergence over a teacher's top logits, with all other tokens in one bucket.

    At a temperature other than 1, or if the teacher keeps no normaliser, the mass of the others is
    unknown. Then only the top logits are compared, both sides renormalised, and the value is
    multiplied by the square of the temperature.

    Attributes:
        temperature: Divides the logits of both.
    """

    temperature: float = 1.0
    teacher = TeacherNeeds(top_k=1, rest=False, same_vocabulary=True)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")

    def student(self, teacher: Any) -> StudentNeeds:
        return StudentNeeds(ids=teacher.top.indices)

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        warm, top = self.temperature, teacher.top
        k = top.values.shape[-1]
        # The normaliser at temperature 1 does not give that at another temperature.
        if warm == 1.0 and top.log_z is not None:
            return self.whole(losses.Readout(read.log_z, gathered=read.gathered[..., :k]), teacher)
        pair = (read.gathered[..., :k] / warm, top.values / warm)
        # Gradients of the logits shrink by 1 / T^2 (Hinton et al.); this preserves their scale.
        return warm**2 * self.renormalised(*pair)

    @abc.abstractmethod
    def whole(self, student: losses.Readout, teacher: Any) -> jax.Array:
        """Return the divergence with a bucket for all other tokens."""

    @abc.abstractmethod
    def renormalised(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        """Return the divergence of two softmaxes over the top tokens alone."""
