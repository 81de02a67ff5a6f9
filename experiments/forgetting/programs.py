"""The jitted programs of forgetting, which its run and the planner share."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.forgetting.config import ALL, Config
from experiments.forgetting.teach import make_update
from experiments.shared import fit, shapes
from logitjax import models, training
from logitjax.training import Program


def programs(config: Config, mesh: Any) -> Iterator[Program]:
    """The updates of all methods, those of all weights first, and of teaching the target."""
    shape = shapes.decoder_config(config.model)
    dtype = jnp.dtype(config.dtype)
    target = nnx.eval_shape(
        lambda: models.Decoder(shape, rngs=nnx.Rngs(0), layout="listed", dtype=dtype)
    )
    weights = nnx.to_pure_dict(nnx.state(target, nnx.Param))

    def lora(config: models.DecoderConfig, rank: int) -> Any:
        key = jax.random.key(0)
        return jax.eval_shape(lambda: models.Lora.init(config, rank, key=key, layout="listed"))

    def batch(rows: int, sides: Any) -> Any:
        names: Any = {"tokens": jnp.int32, "mask": jnp.bool_}
        columns = {name: (kind, config.max_length) for name, kind in names.items()}
        return {side: shapes.rows(mesh, rows, **columns) for side in sides}

    for name in sorted(config.method, key=lambda name: not name.endswith(ALL)):
        settings = config.of(name, 0.0, 0)
        method = settings.method
        loss_fn, constants = method.make_loss(target, adapters=settings.adapters)
        start = weights
        if settings.adapters:
            start = lora(method.adapted(target).config, config.lora_rank)
        schedule = training.Schedule(settings.peak, "linear", total_steps=config.steps)
        update = fit.make_update(loss_fn, schedule, mesh=mesh, b2=0.99)
        rows = batch(config.batch_size, method.sides)
        yield update.program(f"update of {name}", start, rows, constants)
    update, constants = make_update(target, config.teach_rate, config.teach_steps, mesh)
    rows = batch(config.teach_batch, ("forget",))
    yield update.program("update of the target", lora(shape, config.teach_rank), rows, constants)
