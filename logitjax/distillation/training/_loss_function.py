"""An objective as the functions that training and evaluation take.

Nothing here holds logits: one sweep over the vocabulary yields what the terms need of the student,
and what the teachers say comes with the batch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from logitjax import losses
from logitjax.distillation._objective import Objective
from logitjax.distillation._teacher import Teacher, Vocabularies
from logitjax.distillation.training._student import Student, hidden_states


def targets(columns: Mapping[str, Any]) -> tuple[Any, Any]:
    """The label `tokens[t + 1]` of each position t of packed columns, and where it counts."""
    return columns["tokens"][:, 1:], columns["loss_mask"][:, 1:]


class LossFunction:
    """An objective as `loss(trained, batch, rng, frozen, counts=None) -> (sum, count, metrics)`.

    Args:
        objective: What is minimised.
        student: The student, whose `trained` and `frozen` the function takes. The heads of live
            teachers are `frozen["teachers"]`, by their name.
        sources: Names under which `batch["sources"]` holds the `Teacher` of each, and how its
            vocabulary lies over the student's, where it has another.
    """

    def __init__(
        self,
        objective: Objective,
        student: Student,
        sources: Mapping[str, Vocabularies] | Sequence[str] = (),
    ):
        self._objective, self._student = objective, student
        self._sources = (
            dict(sources)
            if isinstance(sources, Mapping)
            else dict.fromkeys(sources, Vocabularies())
        )

    def __call__(
        self, trained: Any, batch: Mapping[str, Any], rng: Any, frozen: Any, counts: Any = None
    ) -> tuple[Any, Any, dict[str, tuple[Any, Any]]]:
        del rng
        model = self._student.model(trained, frozen)
        labels, where = targets(batch["pivot"])
        return self._objective.value(
            hidden_states(model, batch["pivot"], self._student.adapters(trained)),
            model.head_of(),
            {"labels": labels} | batch.get("columns", {}),
            self._teachers(batch, frozen),
            trained.get("terms"),
            where=where,
            teacher_weights=batch.get("teacher_weights"),
            counts=counts,
        )

    def counts(self, batch: Mapping[str, Any], frozen: Any) -> Any:
        """What the terms see of a whole batch, of which the loss may get a part."""
        labels, where = targets(batch["pivot"])
        columns = {"labels": labels} | batch.get("columns", {})
        return self._objective.counts(columns, self._teachers(batch, frozen), where=where)

    def _teachers(self, batch: Mapping[str, Any], frozen: Any) -> list[Teacher]:
        if self._objective.taught is None:
            return []
        heads = frozen.get("teachers", {})
        return [
            dataclasses.replace(
                batch["sources"][name], vocabularies=vocabularies, head=heads.get(name)
            )
            for name, vocabularies in self._sources.items()
        ]


def score_function(
    student: Student,
) -> Callable[..., tuple[Any, Any, dict[str, tuple[Any, Any]]]]:
    """Held-out scores as `score(trained, batch, rng, frozen) -> (sum, count, metrics)`.

    The sum is of negative log-likelihoods. The metrics have `accuracy`. With `batch["bytes"]`, the
    number of bytes of each label, they have `bits_per_byte`. With `batch["teacher"]`, the output of
    a teacher of the same vocabulary, they have `agreement` of the likeliest tokens and
    `teacher_kl`, the divergence from the teacher by its top logits and, if it is known, the mass of
    all others.
    """

    def score(trained: Any, batch: Mapping[str, Any], rng: Any, frozen: Any) -> Any:
        del rng
        model = student.model(trained, frozen)
        labels, where = targets(batch["pivot"])
        teacher = batch.get("teacher")
        readout = losses.linear_readout(
            hidden_states(model, batch["pivot"], student.adapters(trained)),
            model.head_of(),
            labels=labels,
            ids=None if teacher is None else teacher.indices,
            top_k=1,
        )
        nll = jnp.where(where, readout.cross_entropy, 0.0).sum()
        count = where.sum()
        best = readout.statistics.indices[..., 0]
        metrics = {"accuracy": ((where & (best == labels)).sum(), count)}
        if "bytes" in batch:
            size = jnp.where(where, batch["bytes"], 0).sum()
            metrics["bits_per_byte"] = (nll / math.log(2.0), size)
        if teacher is not None:
            same = best == teacher.indices[..., 0]
            kl = losses.sparse_kl_divergence(
                readout,
                teacher.top_k,
                tail="bucket" if teacher.log_z is not None else "renormalize",
            )
            metrics["agreement"] = ((where & same).sum(), count)
            metrics["teacher_kl"] = (jnp.where(where, kl, 0.0).sum(), count)
        return nll, count, metrics

    return score
