"""A logit difference baked into the weights of one model."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from logitjax.fusion import LogitDifference
from logitjax.losses import kl_divergence
from logitjax.models import DECODER_RULES, Decoder, keep_layers
from logitjax.training import (
    Checkpointer,
    LoopOptions,
    LossFn,
    Schedule,
    TrainState,
    TrainStep,
    make_mesh,
    make_writer,
    train_loop,
)
from logitjax.unlearning.assistant._assistant import Assistant
from logitjax.unlearning.assistant._objective import next_tokens


def make_merge_loss(
    target: Decoder,
    assistant: Assistant,
    *,
    fuse: Callable[..., tuple[Any, Any]] | None = None,
    block: int = 64,
) -> tuple[LossFn, Any]:
    """The divergence of one model from what a target and its assistant say together.

    ::

        mean_{positions} KL( softmax(fuse(target, assistant)) || softmax(student) )

    Logits exist for ``block`` positions at a time.
    """
    fuse = LogitDifference() if fuse is None else fuse
    student_def, params, rest = nnx.split(target, nnx.Param, ...)
    base_def, base_params, base_rest = nnx.split(assistant.base, nnx.Param, ...)
    constants = {
        "target": nnx.to_pure_dict(params),
        "base": nnx.to_pure_dict(base_params),
        "lora": assistant.lora,
    }

    def loss_fn(
        params: Any, batch: Mapping[str, Any], rng: Any, constants: Any
    ) -> tuple[Any, Any, dict[str, tuple[Any, Any]]]:
        del rng
        student = nnx.merge(student_def, params, rest)
        teacher = nnx.merge(student_def, constants["target"], rest)
        helper = dataclasses.replace(
            assistant,
            base=nnx.merge(base_def, constants["base"], base_rest),
            lora=constants["lora"],
        )
        tokens = jnp.asarray(batch["tokens"])
        _, where = next_tokens(tokens, batch["mask"])
        told, _ = teacher.hidden_states(tokens)
        known, _ = helper.hidden_states(tokens)
        hidden, _ = student.hidden_states(tokens)

        @jax.checkpoint
        def divergence(args: Any) -> jax.Array:
            hidden, told, known = args
            fused, _ = fuse(teacher.logits(told), helper.logits(known)[None], None)
            return kl_divergence(student.logits(hidden), jax.lax.stop_gradient(fused))

        def blocks(hidden: jax.Array) -> jax.Array:
            flat = hidden.reshape(-1, hidden.shape[-1])
            return jnp.pad(flat, ((0, -len(flat) % block), (0, 0))).reshape(
                -1, block, flat.shape[-1]
            )

        values = jax.lax.map(divergence, tuple(map(blocks, (hidden, told, known))))
        values = values.reshape(-1)[: where.size].reshape(where.shape)
        return jnp.where(where, values, 0.0).sum(), where.sum(), {}

    return loss_fn, constants


def merge_by_distillation(
    target: Decoder,
    assistant: Assistant,
    batches: Callable[[int], Mapping[str, Any]],
    *,
    schedule: Schedule,
    fuse: Callable[..., tuple[Any, Any]] | None = None,
    block: int = 64,
    seed: int = 0,
    mesh: Any = None,
    workdir: epath.PathLike | None = None,
    options: LoopOptions | None = None,
) -> Decoder:
    """Distil a target and its assistant into one model.

    A logit difference leaves the target's weights as they are: whoever holds them holds what was to
    be forgotten. This trains a copy of the target towards the combined distribution, to export it
    (`logitjax.models.save_pretrained`) and serve it without the assistant. A little training may
    bring back what the new weights still hold; measure that.

    Args:
        target: the model before; it is not changed.
        assistant: trained.
        batches: step -> ``{"tokens", "mask"}`` as in `make_merge_loss`: rows to forget and rows to
            keep, whose prompts may count too. A function of the step alone.
        schedule: the learning rate of AdamW; its ``total_steps`` are those of the training.
        fuse: as for `logitjax.decoding.Ensemble`; ``LogitDifference()`` when None.
        block: positions whose logits are held at a time.
        seed: seed of the run.
        mesh: from `make_mesh`; the first device when None.
        workdir: folder of checkpoints and metrics, to continue after a stop; None for neither.
        options: how often to save and to log; ``LoopOptions()`` when None.

    Returns:
        A decoder like ``target``, with arrays of its own.

    Raises:
        ValueError: the schedule has no ``total_steps``.
    """
    steps = schedule.total_steps
    if steps is None:
        raise ValueError("schedule: expected one with total_steps, got None")
    loss_fn, constants = make_merge_loss(target, assistant, fuse=fuse, block=block)
    student = keep_layers(target, range(target.config.num_layers))
    graphdef, params, rest = nnx.split(student, nnx.Param, ...)
    mesh = make_mesh("data:1", devices=jax.devices()[:1]) if mesh is None else mesh
    if mesh.size > 1:
        constants = DECODER_RULES.place(constants, mesh)
    tx = schedule.optimizer(weight_decay=0.01)
    step = TrainStep(loss_fn, tx, mesh=mesh, schedule=schedule)
    state = TrainState.create(
        nnx.to_pure_dict(params), tx, mesh=mesh, rules=DECODER_RULES, seed=seed
    )
    checkpointer = writer = None
    if workdir is not None:
        checkpointer = Checkpointer(epath.Path(workdir) / "checkpoints", max_to_keep=1)
        writer = make_writer(epath.Path(workdir))
    try:
        state = train_loop(
            state,
            functools.partial(step, constants=constants),
            batches,
            total_steps=steps,
            workdir=workdir,
            checkpointer=checkpointer,
            writer=writer,
            identity={"steps": steps},
            options=options,
        )
    finally:
        if checkpointer is not None:
            checkpointer.close()
    return nnx.merge(graphdef, state.params, rest)
