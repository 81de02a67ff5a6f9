"""Scores of trained networks, and how close their features are to collapse."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.dual_head import diagnostics
from experiments.dual_head.arms import outputs
from experiments.dual_head.data import Part
from experiments.dual_head.train import Trainer

# Rows used for the collapse measures.
_MEASURED = 1000


class Scorer:
    """The compiled scores of a trainer's networks, given the variables of every lane."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._one = jax.jit(self._is_right)
        self._all = jax.jit(self._are_right)
        self._measure = jax.jit(self._measures)

    def accuracy(self, lanes: Any, part: Part) -> np.ndarray:
        """`[lanes]` shares of right answers."""
        return self.right(lanes, part).mean(1)

    def right(self, lanes: Any, part: Part) -> np.ndarray:
        """`[lanes, examples]`: whether each answer is right."""
        pieces = []
        for inputs, labels in _batches(part, 500):
            if self.trainer.stepwise:
                batches = list(zip(inputs, labels, strict=True))
                apart = self.trainer.apart(lanes)
                rows = [[self._one(lane, *xy) for xy in batches] for lane in apart]
            else:
                rows = self._all(lanes, inputs, labels)
            pieces.append(np.asarray(rows).reshape(len(rows), -1))
        return np.concatenate(pieces, 1)[:, : len(part)]

    def measure(self, lanes: Any) -> dict[str, list[float]]:
        """The collapse measures of every lane on the first rows of a fixed order."""
        train = self.trainer.placed.task.train
        rows = np.sort(np.random.default_rng(0).permutation(len(train))[:_MEASURED])
        teacher = None if self.trainer.teacher is None else self.trainer.teacher.argument
        seen = (train.inputs[rows], train.labels[rows], teacher, rows)
        measured = [self._measure(lane, *seen) for lane in self.trainer.apart(lanes)]
        return {f"nc/{name}": [float(one[name]) for one in measured] for name in measured[0]}

    def _measures(self, lane: Any, inputs: Any, labels: Any, teacher: Any, rows: Any) -> Any:
        x = self.trainer.prepare(inputs, None)
        target = self.trainer.target(teacher, x, rows)
        model = self.trainer.model_of(lane)
        features, logits, _ = outputs(model, x, train=False)
        kernel, classes = diagnostics.head_kernel(model), self.trainer.placed.task.num_classes
        measured = diagnostics.geometry(features, labels, logits, kernel, classes)
        if self.trainer.arm.logit_loss is None:
            return measured

        def losses(params: Any) -> Any:
            given = (x, labels, target, lane["alpha"])
            return self.trainer.loss_fn(params, lane["stats"], *given, train=False)[0]

        return measured | diagnostics.compare_gradients(losses, lane["params"])

    def _is_right(self, variables: Any, x: Any, y: Any) -> Any:
        logits = self.trainer.model_of(variables)(self.trainer.prepare(x, None))
        return logits.argmax(-1) == y

    def _are_right(self, lanes: Any, inputs: Any, labels: Any) -> Any:
        """`[lanes, batches, batch]`; rows of padding have the label -1."""

        def of_lane(lane: Any) -> Any:
            return jax.lax.map(lambda xy: self._is_right(lane, *xy), (inputs, labels))

        return self.trainer.over_lanes(of_lane, lanes)


def _batches(part: Part, size: int) -> Iterator[tuple[Any, Any]]:
    many = max(1, min(-(-len(part) // size), (256 << 20) // max(1, part.inputs[:1].nbytes * size)))
    for start in range(0, len(part), many * size):
        x = np.asarray(part.inputs[start : start + many * size])
        y = part.labels[start : start + many * size]
        missing = many * size - len(y)
        x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
        y = np.concatenate([y, np.full(missing, -1, y.dtype)])
        yield x.reshape(many, size, *x.shape[1:]), y.reshape(many, size)
