import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term
from logitjax.distillation.tokenizers._likelihood_matching import (
    LikelihoodStatistic,
    likelihood_matching,
)
from logitjax.ops import gather_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALM(Term):
    """Approximate likelihood matching of chunks of text; any tokenizer.

    Attributes:
        temperature: Divides log-probabilities of chunks; the divergence is multiplied by it.
    """

    temperature: float = 100.0
    name = "alm"
    teacher = TeacherNeeds(chunks=True)
    pointwise = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")

    def student(self, teacher: Any) -> StudentNeeds:
        return StudentNeeds(statistic=LikelihoodStatistic(teacher.vocabularies.boundary))

    def seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        # What follows a chunk is read from a state that exists only where a label counts.
        after = gather_at(batch["where"], jnp.maximum(teacher.chunks.ends, 0))
        return teacher.chunks.where & ((teacher.chunks.ends < 0) | after)

    def labels_seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        return teacher.chunks.ids >= 0

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        tau = self.temperature
        value = likelihood_matching(read.statistic, teacher.chunks, temperature=tau)
        # Dividing log-probabilities by tau divides gradients, hence the factor. For infinite tau
        # the value is already the limit of the product.
        return (tau if math.isfinite(tau) else 1.0) * value
