"""The jitted programs of the VQ head experiment, which its run and the planner share."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments.shared import shapes
from experiments.vq_head import arms, train
from experiments.vq_head.config import Config
from logitjax import training, vq
from logitjax.ops.sharding import ShardingRules
from logitjax.training import Program


def _array(*shape: int, dtype: Any = jnp.float32, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def tuning_program(
    tuning: vq.Tuning, mesh: Any, *, vocab: int, width: int, codes: int, top: int = 64
) -> Program:
    """The step that tunes a VQ head to the old one, with abstract arguments."""
    tx, step = tuning.update(mesh)
    params = {"codebook": _array(codes, width), "bias": _array(vocab)}
    state = training.TrainState.abstract(params, tx, mesh=mesh, rules=ShardingRules())
    split = training.BatchLayout(mesh).sharding
    batch = (
        _array(tuning.batch_size, width, sharding=split),
        _array(tuning.batch_size, top, sharding=split),
        _array(tuning.batch_size, top, dtype=jnp.int32, sharding=split),
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    constants = {
        "assignment": _array(vocab, dtype=jnp.int32, sharding=replicated),
        "rest": _array(codes, width, sharding=replicated),
        "rest_counts": _array(vocab, sharding=replicated),
    }
    arguments = (state, batch, constants)
    return Program(name=f"tuning, {codes} codes", jitted=step, arguments=arguments)


def programs(config: Config, mesh: Any) -> Iterator[Program]:
    """Tuning the largest codebook, and the update of the small model that has a VQ head."""
    model = shapes.decoder_config(config.model)
    tuning = vq.Tuning(
        steps=config.steps, batch_size=config.batch_size, learning_rate=config.learning_rate[0]
    )
    sizes = dict(vocab=model.vocab_size, width=model.hidden_size, codes=max(config.codes))
    yield tuning_program(tuning, mesh, **sizes)

    vocab, width = config.scratch_vocab, config.scratch_width
    graphdef, trunk, rest = train.make_trunk(config, vocab, abstract=True)
    loss_fn = train.make_loss(graphdef, rest, arms.label_loss)
    update = train.make_update(loss_fn, config, mesh, config.scratch_learning_rate[0])
    columns = {"tokens": (jnp.int32, config.seq_len), "mask": (jnp.bool_, config.seq_len)}
    batch = shapes.rows(mesh, config.scratch_batch, **columns)
    head = {"codebook": _array(train.codes_of(vocab), width), "bias": _array(vocab)}
    given = {"assignment": _array(vocab, dtype=jnp.int32)}
    params = {"trunk": trunk, "head": head}
    yield update.program("from scratch, vq_bias", params, batch, given)
