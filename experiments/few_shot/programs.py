"""What few-shot learning runs: an arm trained and scored on samples of ImageNet."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.few_shot import arms as few_shot_arms
from experiments.shared import shapes
from logitjax import few_shot, training
from logitjax.few_shot import _sweep as few_shot_sweep

# ImageNet under CLIP's and MoCo's ResNet-50: the largest of the paper's data sets.
_CLASSES, _FEATURES, _AUXILIARY = 1000, 1024, 2048
_HELD_OUT = {"validation": 4 * _CLASSES, "test": 50_000}


def trace_steps(config: Any, devices: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and how to trace each program of a run; the first is the main one. One device each."""
    mesh = training.make_mesh("data:1", devices=devices[:1])
    known = few_shot_arms.arms(config)
    names = [name for name in ("amu", "tip_adapter_f", "cross_modal") if name in config.arm]
    for name in names:
        sweep = functools.partial(_sweep, config, known[name], mesh)
        yield f"{name}, {max(config.shots)} shots", sweep


def _sweep(config: Any, arm: Any, mesh: Any) -> Any:
    kind, _, count = config.views.partition(":")
    views = int(count) if kind == "random" else 1
    runs, shown = config.at_once, max(config.shots) * _CLASSES

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def images(count: int) -> few_shot.FewShotInputs:
        return few_shot.FewShotInputs(
            zero_shot=array(jnp.float32, runs, count, _CLASSES),
            features=array(jnp.float32, runs, count, _FEATURES),
            auxiliary=array(jnp.float32, runs, count, _AUXILIARY),
        )

    columns = {name: array(jnp.float32, len(column)) for name, column in (arm.grid or {}).items()}
    settings = max([len(column) for column in (arm.grid or {}).values()], default=1)
    steps = arm.recipe.total_steps(shown)
    batch = min(arm.recipe.batch_size, shown)
    held_out = {
        name: (images(count), array(jnp.int32, runs, count)) for name, count in _HELD_OUT.items()
    }
    data = (
        array(jnp.int32, runs),
        images(views * shown),
        array(jnp.int32, runs, shown),
        array(jnp.int32, runs, steps, batch),
        held_out,
    )
    arguments = (
        data,
        columns | {"": array(jnp.float32, settings)},
        array(jnp.float32, _FEATURES, _CLASSES),
        array(jnp.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    return few_shot_sweep._sweep.trace(
        *shapes.replicated(mesh, arguments),
        config=arm.config,
        training=arm.recipe,
        views=views,
        sequential=config.at_once == 1,
        batch_size=1024,
    )
