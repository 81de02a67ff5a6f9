import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.distillation._objective import Objective
from logitjax.distillation._teacher import Teacher, Vocabularies
from logitjax.distillation.training._student import Student, hidden_states, targets


class LossFunction:
    """An objective as `loss(trained, batch, rng, frozen, counts=None) -> (sum, count, metrics)`.

    Args:
        student: The student, whose `trained` and `frozen` the function takes. `frozen["teachers"]`
            has the heads of live teachers, by name.
        sources: Names of the `Teacher` values in `batch["sources"]`, and the relation of each
            vocabulary to the student's.
    """

    def __init__(self, objective: Objective, student: Student, sources: Mapping[str, Vocabularies]):
        self._objective, self._student, self._sources = objective, student, dict(sources)

    def __call__(
        self, trained: Any, batch: Mapping[str, Any], rng: Any, frozen: Any, counts: Any = None
    ) -> tuple[Any, Any, dict[str, tuple[Any, Any]]]:
        del rng  # no term draws
        model = self._student.model(trained, frozen)
        labels, where = targets(batch["pivot"])
        return self._objective.value(
            hidden_states(model, batch["pivot"], self._student.adapters(trained)),
            model.head_of(),
            # On-policy rows have `log_probs`.
            {"labels": labels} | batch.get("columns", {}),
            self._teachers(batch, frozen),
            trained.get("terms"),
            where=where,
            teacher_weights=batch.get("teacher_weights"),
            counts=counts,
        )

    def counts(self, batch: Mapping[str, Any], frozen: Any) -> Any:
        """Count the positions that terms use in a whole batch, of which the loss may get parts."""
        labels, where = targets(batch["pivot"])
        columns = {"labels": labels} | batch.get("columns", {})
        return self._objective.counts(columns, self._teachers(batch, frozen), where=where)

    def _teachers(self, batch: Mapping[str, Any], frozen: Any) -> list[Teacher]:
        if self._objective.taught is None:
            return []
        # Only live teachers have heads.
        heads = frozen.get("teachers", {})
        return [
            dataclasses.replace(
                batch["sources"][name], vocabularies=vocabularies, head=heads.get(name)
            )
            for name, vocabularies in self._sources.items()
        ]
