"""What graph fusion runs: the update of every arm of a preset."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from experiments import _fusion, _fusion_run, _plan_models
from logitjax import training

CHIP = "v5p:4x4x8"


def trace_steps(config: Any, devices: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and how to trace each program of a run; the first is the main one."""
    mesh = training.make_mesh(config.mesh, devices=devices)
    pivot = _plan_models.decoder_config(config.pivot)
    # Two losses in one update need the most; the others are below it.
    arms = sorted(config.loss, key=lambda loss: (loss != "uld+gld", loss))
    for loss in arms:
        if loss != _fusion.DUAL:
            yield (
                f"update of the {loss} arm",
                functools.partial(_fusion_run.trace_step, config, pivot, mesh, loss=loss),
            )
