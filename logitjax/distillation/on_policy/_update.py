import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from logitjax import storage, training
from logitjax.distillation.on_policy._rollouts import Rollouts


def on_policy_update(
    rollouts: Rollouts,
    taught: Callable[[Mapping[str, Any]], dict[str, Any]],
    step: training.TrainStep,
    frozen: Any,
    *,
    oldest: Callable[[], int],
    reported: Callable[[], dict[str, tuple[float, float]]],
) -> Callable[[training.TrainState, Mapping[str, Any]], Any]:
    """Build `(state, rows) -> (state, output)` for `train_loop`, which times each part."""

    def update(state: training.TrainState, rows: Mapping[str, Any]) -> Any:
        number = int(state.step)
        storage.progress.mark(f"step {number + 1}: the student writes")
        mixed, log_probs, metrics = rollouts.mix(
            number, rows, state.params, frozen, oldest=oldest()
        )
        storage.progress.mark(f"step {number + 1}: the teachers read")
        clocks = [time.perf_counter()]
        batch = taught(mixed) | {"columns": {"log_probs": log_probs}}
        clocks.append(time.perf_counter())
        state, output = step(state, batch, constants=frozen)
        # Wait for each part, because the next one uses the same devices.
        jax.block_until_ready(output.metrics)
        clocks.append(time.perf_counter())
        tokens = float(np.size(batch["pivot"]["tokens"]))
        for name, seconds in zip(("teacher", "update"), np.diff(clocks), strict=True):
            metrics[f"{name}/tokens_per_second"] = (tokens, float(seconds))
        metrics |= reported()
        return state, dataclasses.replace(output, metrics={**output.metrics, **metrics})

    return update
