"""The jitted programs of the VQ head experiment, which its run and the planner share."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.shared import shapes
from experiments.vq_head import arms, train
from experiments.vq_head.config import Config
from logitjax import vq
from logitjax.training import Program


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def programs(config: Config, mesh: Any) -> Iterator[Program]:
    """Tuning the largest codebook, and the update of the small model that has a VQ head."""
    model = shapes.decoder_config(config.model)
    tuning = vq.Tuning(
        steps=config.steps, batch_size=config.batch_size, learning_rate=config.learning_rate[0]
    )
    yield tuning.program(
        mesh, vocab=model.vocab_size, width=model.hidden_size, codes=max(config.codes)
    )

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
