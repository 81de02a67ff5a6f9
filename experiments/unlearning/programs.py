"""The jitted programs of unlearning, which its run and the planner share."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.shared import shapes
from experiments.unlearning import arms, train
from experiments.unlearning.config import Config
from logitjax import models, unlearning
from logitjax.training import Program


def programs(config: Config, mesh: Any) -> Iterator[Program]:
    """The updates of NPO + KL, of an assistant, and of the target."""
    target = _target(config)
    graphdef, state, rest = nnx.split(target, nnx.Param, ...)
    params = nnx.to_pure_dict(state)
    columns = {"tokens": (jnp.int32, config.max_length), "mask": (jnp.bool_, config.max_length)}
    side = shapes.rows(mesh, config.batch_size, **columns)
    batch = {"forget": side, "retain": side}
    epochs: Any = dict(per_epoch=1, epochs=config.epochs)

    loss_fn, _ = unlearning.METHODS.parse("npo_kl").make_loss(target)
    update = train.epochs_update(loss_fn, config.learning_rate, mesh, **epochs, b2=0.999)
    yield update.program("update of npo_kl", params, batch, params)

    def adapters(params: Any) -> Any:
        model = nnx.merge(graphdef, params, rest)
        options: Any = dict(rank=config.rank, alpha=float(config.rank), key=jax.random.key(0))
        return unlearning.Assistant.init(model, config.assistant_layers, **options).lora

    method = arms.differences(config)["difference_clean"].method(config.assistant_layers)
    loss_fn, constants = method.make_loss(target)
    rate = config.assistant_learning_rate
    update = train.epochs_update(loss_fn, rate, mesh, **epochs, b2=0.99)
    lora = jax.eval_shape(adapters, params)
    yield update.program("update of an assistant", lora, batch, constants)

    types: Any = {"tokens": jnp.int32, "mask": jnp.bool_, "segment_ids": jnp.int32}
    columns = {name: (dtype, config.row_length) for name, dtype in types.items()}
    batch = shapes.rows(mesh, config.finetune_batch, **columns)
    update = train.finetuning_update(config, target, mesh, steps=config.finetune_epochs)
    yield update.program("update of the target", params, batch)


def _target(config: Config) -> models.Decoder:
    """The model that is to forget, of shapes alone."""
    shape = shapes.decoder_config(config.model)
    if config.layers:
        kept = sum(i < shape.num_layers for i in config.layers)
        shape = dataclasses.replace(shape, num_layers=kept)
    dtype = jnp.dtype(config.dtype)
    return nnx.eval_shape(
        lambda: models.Decoder(shape, rngs=nnx.Rngs(0), layout="listed", dtype=dtype)
    )
