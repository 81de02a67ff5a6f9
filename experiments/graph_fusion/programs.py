"""What graph fusion runs: the update of every arm of a preset."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from experiments.graph_fusion import train
from experiments.shared import shapes
from logitjax import training
from logitjax.distillation import objectives


def trace_steps(config: Any, devices: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and how to trace each program of a run; the first is the main one."""
    mesh = training.make_mesh(config.mesh, devices=devices)
    pivot = shapes.decoder_config(config.pivot)
    # Two losses in one update need the most; the others are below it.
    arms = sorted(config.loss, key=lambda loss: (loss != "uld+gld", loss))
    for loss in arms:
        if loss != objectives.DUAL:
            yield (
                f"update of the {loss} arm",
                functools.partial(train.trace_step, config, pivot, mesh, loss=loss),
            )
