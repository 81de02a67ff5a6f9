"""What dual-head distillation runs: an epoch of the student under a frozen teacher."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.dual_head import arms as dual_head_arms
from experiments.dual_head import data as dual_head_data
from experiments.dual_head import train as dual_head_train
from experiments.shared import shapes
from logitjax import training

# Images and classes of the data sets that presets name.
_SIZES = {
    "cifar-100": (50_000, 100),
    "tiny-imagenet": (100_000, 200),
    "imagenet": (1_281_167, 1000),
}


def trace_steps(config: Any, devices: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and how to trace each program of a run; the first is the main one."""
    mesh = training.make_mesh(config.mesh, devices=devices)
    task = _task(config)
    known = dual_head_arms.arms(config)
    teacher = _teacher(_trainer(config, task, known["ce"], config.teacher, mesh))
    names = [name for name in config.arm if known[name].logit_loss is not None]
    name = next((name for name in names if known[name].auxiliary), names[-1])
    trainer = _trainer(config, task, known[name], config.student, mesh, teacher)
    yield f"epoch of {name}", lambda: _epoch(trainer, task, mesh)


def _task(config: Any) -> dual_head_data.Task:
    """A task of the right shapes, whose arrays take no memory."""
    kind, _, size = config.data.partition(":")
    side, channels = (32, 3) if kind == "cifar100" else (config.image_size, 3)
    found = [pair for name, pair in _SIZES.items() if name in config.data]
    if kind == "synthetic":
        found = [(config.train_examples + config.validation_examples, int(size))]
    if not found:
        raise ValueError(f"data: the size of {config.data!r} is not known here")
    count, classes = found[0]
    count = config.train_examples or count - config.validation_examples

    def part(length: int) -> dual_head_data.Part:
        images = np.broadcast_to(np.uint8(0), (length, side, side, channels))
        return dual_head_data.Part(inputs=images, labels=np.broadcast_to(np.int32(0), length))

    return dual_head_data.Task(
        train=part(count),
        validation=part(1),
        test=part(1),
        num_classes=classes,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


def _trainer(
    config: Any, task: Any, arm: Any, network: str, mesh: Any, teacher: Any = None
) -> dual_head_train.Trainer:
    alphas = config.alpha if teacher is not None else (0.0,)
    return dual_head_train.Trainer(
        config,
        task,
        arm,
        network=network,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        alphas=alphas,
        teacher=teacher,
        resident=None,
        mesh=mesh,
    )


def _teacher(trainer: Any) -> Any:
    """The teacher's weights, that every step gets."""
    teacher = dual_head_train.Teacher.__new__(dual_head_train.Teacher)
    teacher._graphdef, teacher.precomputed = trainer.graphdef, False
    teacher.argument = shapes.replicated(trainer.mesh, (trainer.params, trainer.stats))
    return teacher


def _epoch(trainer: Any, task: Any, mesh: Any) -> Any:
    """An epoch, or the piece of one that the host hands over at a time."""
    key = jax.random.key(0, impl=trainer.generator)
    replicated = NamedSharding(mesh, P())
    lanes = shapes.replicated(mesh, jax.eval_shape(trainer._initial, key))
    train, batch = task.train, trainer.config.batch_size
    whole = train.inputs.nbytes <= dual_head_train._DEVICE_BYTES
    steps = trainer.steps if whole else min(trainer.steps, dual_head_train._CHUNK_STEPS)
    count = len(train) if whole else steps * batch

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    return jax.jit(trainer._epoch, donate_argnums=0).trace(
        lanes,
        array(jnp.uint8, count, *task.shape),
        array(jnp.int32, count),
        trainer.teacher.argument,
        array(jnp.int32, steps, batch),
        shapes.replicated(mesh, jax.eval_shape(lambda: key)),
        array(jnp.float32),
    )
