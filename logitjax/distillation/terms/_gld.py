import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.distillation._graph_on_logits import GraphConfig, gradient_inside, graph_on_logits
from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLD(Term, GraphConfig):
    """Graph-on-logits distillation (InfiGFusion); any tokenizer.

    The paper leaves these options open. Settings that make the loss identically zero are refused.

    Attributes:
        k: logits kept at each position.
        node: `rank`: node r is the r-th largest logit, so vocabularies need no alignment (the
            paper's figure). `token`: a node is a vocabulary entry (the paper's abstract).
        feature: the number that represents a node, see `transport.graph_features`.
        logits: `standardized`: z-scored over the vocabulary, then top-k; `softmax`: over the
            vocabulary, then top-k; `raw`: the loss grows with the square of the logits.
        compare: `closed_form`: L1 of the sorted features. `sorted_coupling`: the squared difference
            of the two graphs under the matching that sorting finds. It is close to the
            Gromov-Wasserstein optimum while the models differ, but not near convergence: for token
            graphs that differ by noise of .001 it is about 200 times the cost of matching each
            token with itself. If both models share a vocabulary, `transport.certificate` includes
            that matching among its candidates.
    """

    name = "gld"
    pointwise = False

    @property
    def teacher(self) -> TeacherNeeds:  # type: ignore[override]
        return TeacherNeeds(top_k=self.k, moments=True)

    def student(self, teacher: Any) -> StudentNeeds:
        return StudentNeeds(top_k=self.k)

    def seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        # One graph per row, weighted by the number of its labels.
        return batch["where"].sum(-1)

    def labels_seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        return teacher.where

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        student = gradient_inside(read.statistics, batch["where"])
        where = batch["where"] & teacher.where
        value, _ = graph_on_logits(
            student, teacher.statistics, config=self, student_where=where, teacher_where=where
        )
        return value
