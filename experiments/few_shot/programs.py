"""Programs of few-shot learning: an arm trained and scored on samples of ImageNet."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.few_shot.arms import arms
from experiments.few_shot.config import Config
from logitjax import few_shot
from logitjax.training import Program

# ImageNet under CLIP's and MoCo's ResNet-50: the largest of the paper's data sets.
_CLASSES, _FEATURES, _AUXILIARY = 1000, 1024, 2048
_HELD_OUT = {"validation": 4 * _CLASSES, "test": 50_000}


def programs(config: Config, mesh: Mesh) -> Iterator[Program]:
    """Sweeps of the arms that differ in the arrays they hold, each with the most shots."""
    existing = arms(config)
    for name in ("amu", "tip_adapter_f", "task_res"):
        if name in config.arm:
            arm = existing[name].candidate
            task, held_out = _samples(config, mesh)
            program = arm.program(task, held_out, mesh=mesh, sequential=config.at_once == 1)
            yield dataclasses.replace(program, name=f"{name}, {max(config.shots)} shots")


def _samples(config: Config, mesh: Mesh) -> tuple[few_shot.FewShotTask, dict[str, Any]]:
    kind, _, count = config.views.partition(":")
    views = int(count) if kind == "random" else 1
    runs, shown = config.at_once * mesh.devices.shape[0], max(config.shots) * _CLASSES
    array = jax.ShapeDtypeStruct

    def images(count: int) -> few_shot.Inputs:
        return few_shot.Inputs(
            zero_shot=array((runs, count, _CLASSES), jnp.float32),
            features=array((runs, count, _FEATURES), jnp.float32),
            auxiliary=array((runs, count, _AUXILIARY), jnp.float32),
        )

    task = few_shot.FewShotTask(
        support=images(views * shown),
        labels=array((runs, shown), jnp.int32),
        class_weights=array((_FEATURES, _CLASSES), jnp.float32),
        views=views,
    )
    return task, {
        name: (images(count), array((runs, count), jnp.int32)) for name, count in _HELD_OUT.items()
    }
