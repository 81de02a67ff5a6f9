"""Graph-on-logits distillation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax import transport
from logitjax.distillation._graph_on_logits import (
    GraphConfig,
    Logits,
    Node,
    Value,
    gradient_inside,
    graph_on_logits,
)
from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLD(Term):
    """Graph-on-logits distillation (InfiGFusion); any tokenizer.

    Attributes:
        k: Number of top logits of a position, as are all options those of `GraphConfig`.
        node: What a node is.
        feature: The number that stands for a node.
        logits: How logits are scaled.
        compare: How two graphs are compared, `GraphConfig.value`.
    """

    k: int = 10
    node: Node = "rank"
    feature: transport.Feature = "row_sum"
    logits: Logits = "standardized"
    compare: Value = "closed_form"
    name = "gld"
    pointwise = False

    def __post_init__(self) -> None:
        _ = self.graph  # It refuses what makes no sense.

    @property
    def graph(self) -> GraphConfig:
        """The options of the graph."""
        return GraphConfig(
            k=self.k,
            node=self.node,
            feature=self.feature,
            logits=self.logits,
            value=self.compare,
        )

    @property
    def teacher(self) -> TeacherNeeds:  # type: ignore[override]
        return TeacherNeeds(top_k=self.k, moments=True)

    def student(self, teacher: Any) -> StudentNeeds:
        return StudentNeeds(top_k=self.k)

    def seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        # A graph a row, which counts as much as its labels.
        return batch["where"].sum(-1)

    def labels_seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        return teacher.where

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        student = gradient_inside(read.statistics, batch["where"])
        where = batch["where"] & teacher.where
        value, _ = graph_on_logits(
            student, teacher.statistics, config=self.graph, student_where=where, teacher_where=where
        )
        return value
