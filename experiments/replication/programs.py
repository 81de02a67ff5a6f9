"""The jitted programs of replication, which its run and the planner share."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.replication import arms
from experiments.replication.config import Config
from experiments.shared import shapes
from logitjax.training import Program


def programs(config: Config, mesh: Any) -> Iterator[Program]:
    """The update of a student of each kind, teacher included; the most expensive first."""
    deepest = max(int(arm.rpartition("_")[2]) for arm in config.arm)
    trunk = arms.make_trunk(config, config.vocab, config.teacher_layers, abstract=True)
    head = jax.ShapeDtypeStruct((config.vocab, config.width), jnp.float32)
    teacher = {"trunk": trunk.params, "head": head}
    columns = {"tokens": (jnp.int32, config.seq_len), "mask": (jnp.bool_, config.seq_len)}
    batch = shapes.rows(mesh, config.batch_size, **columns)
    for kind in ("recovered", "none", "official"):
        of_student = arms.make_trunk(config, config.vocab, deepest, abstract=True)
        begin = functools.partial(arms.start, kind, layers=deepest, seed=0)
        params, given = jax.eval_shape(begin, of_student.params, teacher, head)
        options: Any = dict(rate=config.learning_rate[0], steps=config.steps)
        update = arms.make_update(arms.Student(of_student, kind), trunk, config, mesh, **options)
        constants = {"given": given, "teacher": teacher}
        yield update.program(f"update of {kind}_{deepest}", params, batch, constants)
