import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.distillation._term import StudentNeeds, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(Term):
    """Cross-entropy on the text (supervised fine-tuning)."""

    name = "sft"

    def student(self, teacher: Any) -> StudentNeeds:
        return StudentNeeds(label=True)

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        return read.cross_entropy
