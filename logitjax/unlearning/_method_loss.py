"""Losses that train a model's own weights: every unlearning method, from hidden states."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax.losses import linear_cross_entropy, linear_kl_divergence
from logitjax.models import Decoder, Lora, first_layers
from logitjax.ops import Positions
from logitjax.training import LossFn
from logitjax.unlearning._linear_losses import linear_pdu, linear_undial
from logitjax.unlearning._losses import dpo, sequence_nll
from logitjax.unlearning._objective import UnlearningMethod, unlearning_objective
from logitjax.unlearning._targets import ce_u, pdu, rmu, undial


def make_answer_loss(model: Decoder) -> LossFn:
    """The loss of finetuning on answers: mean cross-entropy of their tokens.

    Args:
        model: A decoder, or one of shapes alone (`nnx.eval_shape`).

    Returns:
        `loss_fn(params, batch, rng)` for `training.TrainStep`. Batches are `{"tokens",
        "mask"}`, int32 and bool `[rows, time]`, the mask True at the tokens of answers; rows that
        hold several questions have `segment_ids` too.
    """
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params: Any, batch: Mapping[str, Any], rng: Any) -> Any:
        del rng
        model = nnx.merge(graphdef, params, rest)
        hidden, _ = model.hidden_states(batch["tokens"], segment_ids=batch.get("segment_ids"))
        weights = batch["mask"][:, 1:].astype(jnp.float32)
        loss = linear_cross_entropy(
            hidden[:, :-1], model.head_of(), batch["tokens"][:, 1:], weights=weights
        )
        return loss, weights.sum(), {}

    return loss_fn


def make_unlearning_loss(
    method: UnlearningMethod,
    model: Decoder,
    *,
    after_layers: int = 1,
    direction: Any = None,
    most: Mapping[str, int] | None = None,
    adapters: bool = False,
    retain_bound: float = 0.0,
) -> LossFn:
    """The loss of a method on a decoder, for `training.TrainStep`.

    ::

        gamma mean(forget losses) + alpha mean(retain losses)

    Batches are those of `make_assistant_loss`, all sides of one length; `dpo` needs a third side,
    `instead`: the question of each row to forget, with the answer to give instead. The retain loss
    counts answers' tokens; published codes also average the divergence over prompts and padding. No
    logits `[rows, time, vocab]` are formed.

    Args:
        method: A value of `UNLEARNING_METHODS`.
        model: The model that is to forget, or one like it of shapes alone (`nnx.eval_shape`).
        after_layers: Number of layers after which RMU moves hidden states: 8 in OpenUnlearning,
            which hooks the output of `model.layers.7`.
        direction: `[hidden]`, the direction that RMU moves them to, from `rmu_direction`.
        most: Largest number of answers' tokens in any step, of each side. The head then runs at no
            other positions. The loss is nan if there are more.
        adapters: Trains a `models.Lora` beside the model in place of its parameters. The model
            before unlearning is then the same weights without adapters, and needs no second copy.
        retain_bound: Bound of the retain loss for a method with a `dual_step`.

    Returns:
        `loss_fn(params, batch, rng, reference)`; the constants of the step are the parameters of
        the model before, where the method needs a reference or trains adapters. A method with a
        `dual_step` has parameters `{"weights", "multiplier"}`, for `dual_optimizer`.

    >>> from logitjax.models import DecoderConfig
    >>> from logitjax.unlearning import UNLEARNING_METHODS
    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0), layout="listed"))()
    >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    >>> loss_fn = make_unlearning_loss(UNLEARNING_METHODS["npo_kl"], model)
    >>> rows = {"tokens": jnp.array([[1, 2, 3]]), "mask": jnp.array([[False, True, True]])}
    >>> batch = {"forget": rows, "retain": rows}
    >>> loss, count, parts = jax.jit(loss_fn)(params, batch, None, params)
    >>> loss.shape, sorted(parts)
    ((), ['forget', 'retain'])
    """
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    options: dict[str, Any] = {k: v for k, v in method.options.items() if k != "scale"}

    def loss_fn(params: Any, batch: Mapping[str, Any], rng: Any, reference: Any = None) -> Any:
        del rng
        multiplier = None
        if method.dual_step:
            params, multiplier = params["weights"], params["multiplier"]
        lora = params if adapters else None
        model = nnx.merge(graphdef, reference if adapters else params, rest)
        sides = ["forget"] if method.instead == "nothing" else ["forget", "instead"]
        sides += [] if method.retain == "none" else ["retain"]
        before = nnx.merge(graphdef, reference, rest) if method.needs_reference else None
        where = {side: batch[side]["mask"][:, 1:] for side in sides}
        if method.forget_level == "hidden":
            assert before is not None
            tokens = jnp.concatenate([batch[side]["tokens"] for side in sides])
            count = len(batch["forget"]["tokens"])
            states = _layer_states(model, after_layers, tokens, lora)[:, 1:]
            kept = _layer_states(before, after_layers, batch["retain"]["tokens"])[:, 1:]
            forget = method.forget(states[:count], direction)
            retain = rmu(states[count:], kept)
            return _weighed(method, forget, where["forget"], retain, where["retain"])
        positions = {
            side: Positions(where[side], None if most is None else most[side]) for side in sides
        }
        labels = {side: positions[side].pick(batch[side]["tokens"][:, 1:]) for side in sides}

        def states_of(
            which: Decoder, sides: list[str], lora: Lora | None = None
        ) -> dict[str, jax.Array]:
            """Hidden states that predict answers, `[tokens, hidden]`."""
            rows = [batch[side]["tokens"] for side in sides]
            hidden, _ = which.hidden_states(jnp.concatenate(rows), lora=lora)
            cuts = np.cumsum([len(r) for r in rows])[:-1]
            parts = jnp.split(hidden[:, :-1], cuts)
            return {s: positions[s].pick(part) for s, part in zip(sides, parts, strict=True)}

        head, here = model.head_of(), states_of(model, sides, lora)
        there: dict[str, jax.Array] = {}
        theirs = head
        if before is not None:
            # NPO needs the rows to forget, DPO those to say too, the divergence those to keep.
            wanted = [side for side in sides if side != "retain"]
            if method.retain == "kl":
                wanted = [*(wanted if method.forget_level == "answers" else []), "retain"]
            there, theirs = states_of(before, wanted), before.head_of()
        flat = linear_cross_entropy(
            jnp.concatenate([here[side] for side in sides]),
            head,
            jnp.concatenate([labels[side] for side in sides]),
        )
        cuts = np.cumsum([len(labels[side]) for side in sides])[:-1]
        nll = {s: positions[s].put(part) for s, part in zip(sides, jnp.split(flat, cuts))}
        counted = where["forget"] if method.forget_level == "tokens" else None
        if method.forget in (undial, ce_u):
            # CE-U is UNDIAL from the model itself, with nothing left of the label.
            teacher = there.get("forget", here["forget"])
            beta = options.get("beta", float("inf"))
            values = linear_undial(
                here["forget"], head, teacher, theirs, labels["forget"], beta=beta
            )
            if method.forget is ce_u:
                counted = where["forget"] & (jnp.cumsum(where["forget"], axis=-1) > 1)
            forget = positions["forget"].put(values)
        elif method.forget is pdu:
            forget = positions["forget"].put(linear_pdu(here["forget"], head))
        elif method.forget_level == "answers":

            def before_nll(side: str) -> jax.Array:
                old = linear_cross_entropy(there[side], theirs, labels[side])
                return sequence_nll(positions[side].put(old), where[side])[0]

            summed, lengths = sequence_nll(nll["forget"], where["forget"])
            if method.forget is dpo:
                said = sequence_nll(nll["instead"], where["instead"])[0]
                old = [before_nll(side) for side in ("instead", "forget")]
                forget = dpo(said, summed, *old, **options)
            else:
                second = before_nll("forget") if method.needs_reference else lengths
                forget = method.forget(summed, second, **options)
        else:
            forget = method.forget(nll["forget"], **options)
        retain = None
        if method.retain == "kl":
            divergence = linear_kl_divergence(here["retain"], head, there["retain"], theirs)
            retain = positions["retain"].put(divergence)
        elif method.retain != "none":
            retain = nll["retain"]
        loss, one, means = _weighed(method, forget, counted, retain, where.get("retain"))
        if multiplier is not None:
            # By the weights the gradient is that of the Lagrangian, by the multiplier the slack.
            slack = means["retain"][0] - retain_bound
            held = jax.lax.stop_gradient(multiplier)
            loss = method.forget_weight * means["forget"][0] + held * slack
            loss += (held - multiplier) * jax.lax.stop_gradient(slack)
        fit = jnp.stack([positions[side].fits for side in sides]).all()
        return jnp.where(fit, loss, jnp.nan), one, means

    return loss_fn


def _layer_states(model: Decoder, count: int, tokens: Any, lora: Lora | None = None) -> jax.Array:
    """The residual stream after so many layers, without the final norm."""
    cut: Any = first_layers(model, count)
    cut.final_norm = _Identity()
    if lora is not None:
        lora = _first_adapters(lora, [len(segment.layers) for segment in cut.segments])
    return cut.hidden_states(tokens, lora=lora)[0]


def _first_adapters(lora: Lora, counts: Sequence[int]) -> Lora:
    """Those of a model's first layers, by the number of entries in each of its segments."""
    segments = zip(lora.layers, counts)
    return dataclasses.replace(lora, layers=tuple(tuple(s[:count]) for s, count in segments))


class _Identity(nnx.Module):
    def __call__(self, x: Any) -> Any:
        return x


def _weighed(method: UnlearningMethod, forget: Any, counted: Any, retain: Any, kept: Any) -> Any:
    loss, means = unlearning_objective(
        forget,
        retain,
        forget_weight=method.forget_weight,
        retain_weight=method.retain_weight,
        forget_where=counted,
        retain_where=kept,
    )
    one = jnp.float32(1)
    return loss, one, {name: (value, one) for name, value in means.items()}
