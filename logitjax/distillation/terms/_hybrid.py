import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term
from logitjax.distillation.tokenizers._matched_tokens import hybrid_logit_distance


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Matched(Term):
    teacher = TeacherNeeds(top_k=1, projection="exact")

    def student(self, teacher: Any) -> StudentNeeds:
        ids, _ = teacher.vocabularies.matches.ids(teacher.top.indices)
        # The student's most likely tokens are sorted too, like the teacher's.
        return StudentNeeds(ids=ids, top_k=teacher.top.values.shape[-1])

    def seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        return teacher.single

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        local = read.statistics.truncate(teacher.top.values.shape[-1]).top_k
        matches = teacher.vocabularies.matches
        return sum(hybrid_logit_distance(read.top, local, teacher.top, matches, **self.options))

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of the divergence of the matched part."""
        return {"kind": "kl"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid(_Matched):
    """JSD of common tokens plus the sorted distance of the others (GOLD).

    Attributes:
        beta: Share of the teacher in the mixture.
    """

    beta: float = 0.5
    name = "hybrid"

    @property
    def options(self) -> Mapping[str, Any]:
        return {"kind": "jsd", "beta": self.beta}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridKL(_Matched):
    """KL of common tokens plus the sorted distance of the others (X-Token)."""

    name = "hkl"
