"""KL divergences over the whole vocabulary, from a teacher that reads beside the student."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term
from logitjax.losses import sweep


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullKL(Term):
    """KL over the whole vocabulary, of a live teacher's hidden states and head.

    Attributes:
        direction: `'forward'` for KL(teacher || student), `'reverse'` for the other.
        temperature: Divides the logits of both; its square multiplies the value.
    """

    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    name = "full_kl"
    teacher = TeacherNeeds(hidden=True, same_vocabulary=True)

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "reverse"):
            raise ValueError(f"direction: expected 'forward' or 'reverse', got {self.direction!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")

    def student(self, teacher: Any) -> StudentNeeds:
        statistic: sweep.Statistic = sweep.KLStatistic(reverse=self.direction == "reverse")
        if self.temperature != 1.0:
            statistic = sweep.Tempered(statistic, self.temperature)
        return StudentNeeds(statistic=statistic)

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        return self.temperature**2 * read.statistic
