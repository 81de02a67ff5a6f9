"""What replication runs: the update of a student of each kind, teacher and all."""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.replication import models as replication_models
from experiments.shared import shapes
from logitjax import models, training


def trace_steps(config: Any, devices: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and how to trace each program of a run; the first is the main one. One device each."""
    mesh = training.make_mesh("data:1", devices=devices[:1])
    deepest = max(int(arm.rpartition("_")[2]) for arm in config.arm)
    for kind in ("recovered", "none", "official"):
        arm = f"{kind}_{deepest}"
        yield f"update of {arm}", functools.partial(_update, config, arm, mesh)


def _update(config: Any, arm: str, mesh: Any) -> Any:
    kind, _, depth = arm.rpartition("_")
    vocab, width = config.vocab, config.width
    teacher_trunk = _trunk(config, config.teacher_layers)
    student = _trunk(config, int(depth))
    head = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    start: dict[str, Any] = {"trunk": student.params}
    fixed: dict[str, Any] = {"teacher": {"trunk": teacher_trunk.params, "head": head}}
    if kind == "recovered":
        fixed["basis"] = head
        start["mix"] = jax.ShapeDtypeStruct((width, width), jnp.float32)
    elif kind == "official":
        fixed |= {"head": head, "embedding": student.params["embedding"]}
        start["trunk"] = {k: v for k, v in student.params.items() if k != "embedding"}
    else:
        start["head"] = head

    def loss_fn(params: Any, batch: Any, rng: Any, fixed: Any) -> Any:
        scene: Any = types.SimpleNamespace(trunk=teacher_trunk, teacher=fixed["teacher"])
        loss = replication_models.distillation(config, scene, student, official=kind == "official")
        return loss(params, batch, rng, fixed)

    tx = training.make_optimizer(1e-4, warmup=1, total_steps=config.steps, weight_decay=0.01)
    step = training.make_train_step(loss_fn, tx, mesh=mesh)
    state = training.abstract_train_state(start, tx, mesh=mesh)
    columns = {"tokens": (jnp.int32, config.seq_len), "mask": (jnp.bool_, config.seq_len)}
    batch = shapes.rows(mesh, config.batch_size, **columns)
    return step.trace(state, batch, shapes.replicated(mesh, fixed))


def _trunk(config: Any, layers: int) -> Any:
    """A `Trunk` whose parameters are abstract."""
    trunk = replication_models.Trunk.__new__(replication_models.Trunk)
    shape = replication_models.trunk_shape(config, config.vocab, layers)
    model = nnx.eval_shape(
        lambda: models.Decoder(shape, rngs=nnx.Rngs(0), layout="listed", head=nnx.Module())
    )
    trunk.graphdef, params, trunk.rest = nnx.split(model, nnx.Param, ...)
    trunk.params = nnx.to_pure_dict(params)
    return trunk
