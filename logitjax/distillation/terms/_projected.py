import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from logitjax import losses
from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term
from logitjax.distillation.tokenizers._projected_kl import MOST_MEMBERS, bucket_sums, project_top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectedKL(Term):
    """KL over the teacher's vocabulary, with the projection that a subclass's rule names."""

    rule: ClassVar[str]

    def student(self, teacher: Any) -> StudentNeeds:
        projection = teacher.vocabularies.projections[self.rule]
        if self._is_wide(teacher):
            # The student's vocabulary is much larger: sum over whole rows.
            statistic, tokens, blocks = bucket_sums(teacher.top, projection)
            return StudentNeeds(statistic=statistic, tokens=tokens, blocks=blocks)
        merged = projection.merged(teacher.top)
        members = projection.members(merged.indices)
        return StudentNeeds(ids=members.ids, beside=(merged, members))

    def seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        return teacher.where

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        if self._is_wide(teacher):
            return read.statistic
        return losses.sparse_kl_divergence(*project_top_k(read.top, *read.beside))

    def _is_wide(self, teacher: Any) -> bool:
        """Whether too many of the student's tokens map to the teacher's top ones."""
        projection = teacher.vocabularies.projections[self.rule]
        return projection.capacity(teacher.top.values.shape[-1]) > MOST_MEMBERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstPiece(ProjectedKL):
    """KL where each student token counts as the first piece the teacher splits it into."""

    name = "first_piece"
    rule = "first_piece"
    teacher = TeacherNeeds(top_k=1, projection="first_piece")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PKL(ProjectedKL):
    """KL where each student token is spread over its pieces (X-Token)."""

    name = "pkl"
    rule = "spread"
    teacher = TeacherNeeds(top_k=1, projection="spread")
