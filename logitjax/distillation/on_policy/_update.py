"""One update on one's own samples: write, let the teachers read, learn."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from logitjax import storage, training
from logitjax.distillation.on_policy._rollouts import Rollouts


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicyUpdate:
    """`(state, rows) -> (state, output)` for `training.train_loop`, with the seconds of each part.

    Attributes:
        rollouts: Writes a part of the rows.
        taught: Rows to a batch with what the teachers say of them.
        step: The update.
        frozen: Its constants.
        oldest: Step of the oldest checkpoint.
        reported: What teachers have to report of the last reading.
    """

    rollouts: Rollouts
    taught: Callable[[Mapping[str, Any]], dict[str, Any]]
    step: training.TrainStep
    frozen: Any
    oldest: Callable[[], int]
    reported: Callable[[], dict[str, tuple[float, float]]] = dict

    def __call__(
        self, state: training.TrainState, rows: Mapping[str, Any]
    ) -> tuple[training.TrainState, training.StepOutput]:
        number = int(state.step)
        storage.progress.mark(f"step {number + 1}: the student writes")
        mixed, log_probs, metrics = self.rollouts.mix(
            number, rows, state.params, self.frozen, oldest=self.oldest()
        )
        storage.progress.mark(f"step {number + 1}: the teachers read")
        clocks = [time.perf_counter()]
        batch = self.taught(mixed) | {"columns": {"log_probs": log_probs}}
        clocks.append(time.perf_counter())
        state, output = self.step(state, batch, constants=self.frozen)
        # Each part is waited for: the next one works on the same devices.
        jax.block_until_ready(output.metrics)
        clocks.append(time.perf_counter())
        tokens = float(np.size(batch["pivot"]["tokens"]))
        for name, seconds in zip(("teacher", "update"), np.diff(clocks), strict=True):
            metrics[f"{name}/tokens_per_second"] = (tokens, float(seconds))
        metrics |= self.reported()
        return state, dataclasses.replace(output, metrics={**output.metrics, **metrics})
