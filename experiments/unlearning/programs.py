"""What unlearning trains: the target, an arm that needs a reference of it, an assistant."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.shared import shapes as plan_shapes
from experiments.unlearning import arms as arms
from logitjax import models, training, unlearning


def trace_steps(config: Any, devices: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and how to trace each program of a run; the first is the main one."""
    mesh = training.make_mesh(config.mesh, devices=devices)
    yield "update of npo_kl", functools.partial(_arm, config, mesh)
    yield "update of an assistant", functools.partial(_assistant, config, mesh)
    yield "update of the target", functools.partial(_finetuning, config, mesh)


def _target(config: Any) -> models.Decoder:
    """The model that is to forget, of shapes alone."""
    shape = plan_shapes.decoder_config(config.model)
    if config.layers:
        kept = sum(i < shape.num_layers for i in config.layers)
        shape = dataclasses.replace(shape, num_layers=kept)
    return nnx.eval_shape(
        lambda: models.Decoder(shape, rngs=nnx.Rngs(0), layout="listed", dtype=config.dtype)
    )


def _parts(config: Any) -> tuple[Any, Any, Any]:
    """Its graph definition, parameters and the rest."""
    graphdef, params, rest = nnx.split(_target(config), nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), rest


def _questions(config: Any, mesh: Any) -> dict[str, Any]:
    """Rows to forget and rows to keep."""
    columns = {"tokens": (jnp.int32, config.max_length), "mask": (jnp.bool_, config.max_length)}
    side = plan_shapes.rows(mesh, config.batch_size, **columns)
    return {"forget": side, "retain": side}


def _placed(mesh: Any, tree: Any) -> Any:
    """Abstract arrays where the decoder's rules put them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        models.DECODER_RULES.shardings(tree, mesh),
    )


def _trace(loss_fn: Any, params: Any, batch: Any, mesh: Any, constants: Any = None) -> Any:
    schedule = training.Schedule(1e-5, "linear", warmup=1, total_steps=10, final=0.0)
    tx = training.make_optimizer(schedule, weight_decay=0.01)
    step = training.make_train_step(loss_fn, tx, mesh=mesh)
    state = training.abstract_train_state(params, tx, mesh=mesh, rules=models.DECODER_RULES)
    return step.trace(state, batch, constants)


def _arm(config: Any, mesh: Any) -> Any:
    graphdef, params, rest = _parts(config)
    loss_fn = arms.make_loss(unlearning.UNLEARNING_METHODS[arms.METHODS["npo_kl"]], graphdef, rest)
    return _trace(loss_fn, params, _questions(config, mesh), mesh, _placed(mesh, params))


def _assistant(config: Any, mesh: Any) -> Any:
    graphdef, params, rest = _parts(config)

    def adapters(params: Any) -> Any:
        target = nnx.merge(graphdef, params, rest)
        options: Any = dict(rank=config.rank, alpha=float(config.rank), key=jax.random.key(0))
        return unlearning.init_assistant(target, config.assistant_layers, **options).lora

    base = models.first_layers(_target(config), config.assistant_layers)
    graphdef_of_base, shapes, rest_of_base = nnx.split(base, nnx.Param, ...)

    def loss_fn(lora: Any, batch: Any, rng: Any, constants: Any) -> Any:
        base = nnx.merge(graphdef_of_base, constants, rest_of_base)
        loss, constants = unlearning.make_assistant_loss(base, retain_weight=config.betas[0])
        return loss(lora, batch, rng, constants)

    constants = nnx.to_pure_dict(shapes)
    lora = jax.eval_shape(adapters, params)
    return _trace(loss_fn, lora, _questions(config, mesh), mesh, _placed(mesh, constants))


def _finetuning(config: Any, mesh: Any) -> Any:
    graphdef, params, rest = _parts(config)
    columns = {"tokens": jnp.int32, "mask": jnp.bool_, "segment_ids": jnp.int32}
    batch = plan_shapes.rows(
        mesh,
        config.finetune_batch,
        **{name: (dtype, config.row_length) for name, dtype in columns.items()},
    )
    return _trace(arms.answer_loss(graphdef, rest), params, batch, mesh)
