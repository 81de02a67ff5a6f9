"""What the VQ head runs: tuning a codebook, and the small model that is trained from scratch."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.shared import shapes as plan_shapes
from experiments.vq_head import scratch
from logitjax import models, training, vq

_TOP = 64


def trace_steps(config: Any, devices: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and how to trace each program of a run; the first is the main one. One device each."""
    mesh = training.make_mesh("data:1", devices=devices[:1])
    codes = max(config.codes)
    yield f"tuning, {codes} codes", lambda: _tuning(config, codes, mesh)
    yield "from scratch, vq_bias", lambda: _scratch(config, mesh)


def _tuning(config: Any, codes: int, mesh: Any) -> Any:
    model = plan_shapes.decoder_config(config.model)
    vocab, width = model.vocab_size, model.hidden_size
    shapes = {"codebook": jnp.zeros((codes, width)), "bias": jnp.zeros(vocab)}
    constants = {
        "assignment": jnp.zeros(vocab, jnp.int32),
        "rest": jnp.zeros((codes, width)),
        "rest_counts": jnp.zeros(vocab),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3, b2=0.99, eps=1e-6))

    def loss_fn(params: Any, batch: Any, rng: Any, constants: Any) -> Any:
        columns = (batch[name] for name in ("hidden", "probs", "tokens"))
        losses = vq.vq_distillation_loss(params, constants, *columns)
        return losses.sum(), losses.size, {}

    step = training.make_train_step(loss_fn, tx, mesh=mesh)
    state = training.abstract_train_state(lambda key: shapes, tx, mesh=mesh)
    batch = plan_shapes.rows(
        mesh,
        config.batch_size,
        hidden=(jnp.float32, width),
        probs=(jnp.float32, _TOP),
        tokens=(jnp.int32, _TOP),
    )
    return step.trace(state, batch, plan_shapes.replicated(mesh, constants))


def _scratch(config: Any, mesh: Any) -> Any:
    vocab, width = config.scratch_vocab, config.scratch_width
    codes = max(2, vocab // 16)
    shape = scratch.shape_of(vocab, width)
    trunk = nnx.eval_shape(lambda: models.Decoder(shape, rngs=nnx.Rngs(0), head=nnx.Module()))
    graphdef, params, rest = nnx.split(trunk, nnx.Param, ...)
    start = {
        "trunk": nnx.to_pure_dict(params),
        "head": {
            "codebook": jax.ShapeDtypeStruct((codes, width), jnp.float32),
            "bias": jax.ShapeDtypeStruct((vocab,), jnp.float32),
        },
    }

    def loss_fn(params: Any, batch: Any, rng: Any, fixed: Any) -> Any:
        model = nnx.merge(graphdef, params["trunk"], rest)
        hidden = model.hidden_states(batch["tokens"])[0][:, :-1]
        mask = batch["mask"][:, 1:]
        head = params["head"]
        labels = batch["tokens"][:, 1:]
        nll = vq.vq_nll(hidden, head["codebook"], head["bias"], fixed["assignment"], labels)
        return (nll * mask).sum(), mask.sum(), {}

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    step = training.make_train_step(loss_fn, tx, mesh=mesh)
    state = training.abstract_train_state(start, tx, mesh=mesh)
    columns = {"tokens": (jnp.int32, config.seq_len), "mask": (jnp.bool_, config.seq_len)}
    batch = plan_shapes.rows(mesh, config.scratch_batch, **columns)
    fixed = {"assignment": jax.ShapeDtypeStruct((vocab,), jnp.int32)}
    return step.trace(state, batch, plan_shapes.replicated(mesh, fixed))
