"""Programs of dual-head distillation: an epoch of the student under a frozen teacher."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.dual_head.arms import arms
from experiments.dual_head.config import Config
from experiments.dual_head.data import Part, Placed, Task, fits_on_device
from experiments.dual_head.train import Course, Given, Teacher, Trainer
from experiments.shared import shapes
from logitjax.training import Program

# Images and classes of the data sets that presets name.
_SIZES = {
    "cifar-100": (50_000, 100),
    "tiny-imagenet": (100_000, 200),
    "imagenet": (1_281_167, 1000),
}


def programs(config: Config, mesh: Mesh) -> Iterator[Program]:
    """The epoch of an arm with a teacher, of one with two heads if there is any.

    On CPU a run takes the steps of a convolutional epoch one by one, see `train.Trainer`.
    """
    placed, existing = Placed(task=_task(config), mesh=mesh, arrays=None), arms(config)
    teaching = Trainer(config, placed, existing["ce"], Course.of_teacher(config))
    weights = shapes.replicated(mesh, (teaching.params, teaching.stats))
    teacher = Teacher(graphdef=teaching.graphdef, argument=weights, precomputed=False)
    names = [name for name in config.arm if existing[name].logit_loss is not None]
    name = next((name for name in names if existing[name].auxiliary), names[-1])
    trainer = Trainer(
        config, placed, existing[name], Course.of_student(config, existing[name]), teacher=teacher
    )
    steps = trainer.steps if fits_on_device(placed.task) else placed.chunk_steps
    steps = min(steps, trainer.steps)
    rows = len(placed.task.train) if fits_on_device(placed.task) else steps * config.batch_size
    abstract = jax.ShapeDtypeStruct
    given = Given(
        inputs=abstract((rows, *placed.task.shape), jnp.uint8),
        labels=abstract((rows,), jnp.int32),
        teacher=weights,
        key=jax.eval_shape(lambda: jax.random.key(0)),
        on=abstract((), jnp.float32),
    )
    order = abstract((steps, config.batch_size), jnp.int32)
    yield Program(
        name=f"epoch of {name}",
        jitted=trainer.epoch,
        arguments=shapes.replicated(mesh, (trainer.abstract(), given, order)),
    )


def _task(config: Config) -> Task:
    kind, _, size = config.data.partition(":")
    side, channels = (32, 3) if kind == "cifar100" else (config.image_size, 3)
    sizes = [pair for name, pair in _SIZES.items() if name in config.data]
    if kind == "synthetic":
        sizes = [(config.train_examples + config.validation_examples, int(size))]
    if not sizes:
        raise ValueError(f"data: the size of {config.data!r} is not known here")
    count, classes = sizes[0]
    count = config.train_examples or count - config.validation_examples

    def part(length: int) -> Part:
        images = np.broadcast_to(np.uint8(0), (length, side, side, channels))
        return Part(inputs=images, labels=np.broadcast_to(np.int32(0), length))

    return Task(
        train=part(count),
        validation=part(1),
        test=part(1),
        num_classes=classes,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )
