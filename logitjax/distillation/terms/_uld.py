import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term
from logitjax.distillation._universal_logit_distance import universal_logit_distance


@dataclasses.dataclass(frozen=True, kw_only=True)
class ULD(Term):
    """Universal logit distance of sorted probabilities; any tokenizer.

    Attributes:
        k: Number of top logits to compare.
    """

    k: int = 10
    name = "uld"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: expected at least 1, got {self.k}")

    @property
    def teacher(self) -> TeacherNeeds:  # type: ignore[override]
        return TeacherNeeds(top_k=self.k)

    def student(self, teacher: Any) -> StudentNeeds:
        return StudentNeeds(top_k=self.k)

    def seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        return teacher.where

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        return universal_logit_distance(read.statistics.top_k, teacher.top, top_k=self.k)
