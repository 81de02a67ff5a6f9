"""Samples of a few-shot task: the pictures for training, validation and tests."""

import dataclasses
from typing import Any

import jax
import numpy as np

from experiments.few_shot.arms import Auxiliary
from experiments.few_shot.data import Task
from logitjax import few_shot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Several samples of a task, padded so that all numbers of shots have one shape.

    Attributes:
        task: `[runs, views * n, ...]` pictures to learn from; padding has the label -1.
        held_out: Validation, test and shifted pictures; padding has the label -1.
    """

    task: few_shot.FewShotTask
    held_out: dict[str, tuple[few_shot.Inputs, np.ndarray]]

    def with_auxiliary(self, whose: Auxiliary) -> "Samples":
        """The samples with other auxiliary features: see `Arm.auxiliary`."""
        if whose == "second":
            return self

        def with_other_features(images: few_shot.Inputs) -> few_shot.Inputs:
            if whose == "zero_shot":
                return dataclasses.replace(images, auxiliary=images.features)
            count = images.auxiliary.shape[1]
            rows = np.random.default_rng(count).permutation(count)
            return dataclasses.replace(images, auxiliary=images.auxiliary[:, rows])

        return Samples(
            task=dataclasses.replace(self.task, support=with_other_features(self.task.support)),
            held_out={
                name: (with_other_features(images), y)
                for name, (images, y) in self.held_out.items()
            },
        )


def rows_of_run(
    task: Task, shots: int, *, run: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `task.train` to learn from, to validate on, and, if it has no test, to test on.

    Larger samples contain the smaller ones; validation rows do not depend on the shots. A class
    with too few pictures gives fewer shots.
    """
    rng = np.random.default_rng([seed, run])
    for_validation, for_test = (2, 2) if task.test is None else (4, 0)
    parts: tuple[list, list, list] = ([], [], [])
    for number in range(len(task.class_names)):
        rows = rng.permutation(np.flatnonzero(task.train_labels == number))
        count = min(shots, len(rows) - for_validation - for_test)
        if count < 1:
            raise ValueError(
                f"data: {task.name} has {len(rows)} pictures of {task.class_names[number]!r}, too "
                "few to learn from, validate and test"
            )
        parts[0].append(rows[:count])
        parts[1].append(rows[-for_validation:])
        parts[2].append(rows[count:-for_validation])
    train, validation, test = (np.concatenate(part) for part in parts)
    return train, validation, test


def draw(task: Task, shots: int, *, runs: Any, most: int, seed: int = 0, parts: int = 0) -> Samples:
    """Samples of the runs with these numbers, with room for `most` shots."""
    drawn = [rows_of_run(task, shots, run=run, seed=seed) for run in runs]
    room = [rows_of_run(task, most, run=runs[0], seed=seed)[0].size]
    # The fewer the shots, the more pictures are left for the test.
    room += [drawn[0][1].size, rows_of_run(task, 1, run=runs[0], seed=seed)[2].size]

    def padded(part: int) -> np.ndarray:
        rows = np.full((len(drawn), room[part]), -1)
        for run, result in enumerate(drawn):
            rows[run, : result[part].size] = result[part]
        return rows

    def labels_of(rows: np.ndarray) -> np.ndarray:
        return np.where(rows >= 0, task.train_labels[rows], -1)

    def views_of(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.moveaxis(x[:, rows], 0, 1).reshape(len(rows), -1, x.shape[-1])

    def plain(rows: np.ndarray) -> Any:
        return task.plain[rows], labels_of(rows)

    def whole(images: few_shot.Inputs, labels: np.ndarray) -> Any:
        return jax.tree.map(lambda x: np.repeat(x[None], len(drawn), 0), (images, labels))

    rows = padded(0)
    support = jax.tree.map(lambda x: views_of(x, rows), task.train)
    held_out = {"validation": plain(padded(1))}
    held_out["test"] = plain(padded(2)) if task.test is None else whole(*task.test)
    held_out |= {name: whole(*result) for name, result in task.shifted.items()}
    if task.test is not None and parts:
        for part, some in enumerate(np.array_split(np.arange(len(task.test[1])), parts)):
            held_out[f"part {part}"] = whole(*jax.tree.map(lambda x, i=some: x[i], task.test))
    sampled = few_shot.FewShotTask(
        support=support, labels=labels_of(rows), class_weights=task.class_weights, views=task.views
    )
    return Samples(task=sampled, held_out=held_out)
