"""The arms of unlearning: what each minimises, all from hidden states."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax import fusion, losses, models, ops, unlearning

#: Arms that train the model's own weights, by the names of `unlearning.UNLEARNING_METHODS`.
METHODS: Mapping[str, str] = {
    "ga": "gradient_ascent",
    "grad_diff": "gradient_difference",
    "npo": "npo",
    "npo_gd": "npo_gradient_difference",
    "npo_kl": "npo_kl",
    "simnpo": "simnpo",
    "rmu": "rmu",
    "undial": "undial",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One way to train an assistant and to take its logits away.

    Attributes:
      rank: of the adapters.
      lora_alpha: their scale times their rank.
      retain_weight: beta.
      uniform: where it is silent: ``'answers'`` or ``'all'`` positions.
      silent: on which rows: of ``'all'`` kept authors, or on as many as are forgotten and on wrong
        answers to the forgotten questions, as ``'released'``.
      fuse: while a text is scored; keeps what it leaves out.
      generating: while one is generated.
    """

    rank: int
    lora_alpha: float
    retain_weight: float
    uniform: str
    silent: str
    fuse: fusion.LogitDifference
    generating: fusion.LogitDifference


def differences(config: Any) -> dict[str, Difference]:
    """Arms that leave the model's weights alone.

    ``official`` is the released code: rank 16, beta 5, silence at all positions, the int(0.01 V)
    most likely tokens changed by raw logits with weight 0.8, nothing else generated. ``clean`` has
    the paper's rank, silence on answers, and centred logits; beta and alpha are chosen, and so is
    whether a filter keeps the logits of tokens under a hundredth of the largest probability. They
    are not excluded while generating: a confident target would have one token left to choose from,
    and forget nothing. It is silent about all kept authors: where it has only seen as many as are
    forgotten, and wrong answers that begin as right ones do, a small assistant is not silent about
    the others.
    """
    official = fusion.LogitDifference(alpha=0.8, form="raw", filter="official", rate=0.01)
    clean = fusion.LogitDifference(alpha=config.alpha, filter=config.filters[0])
    return {
        "difference_official": Difference(
            rank=config.rank // 2,
            lora_alpha=float(config.rank),
            retain_weight=5.0,
            uniform="all",
            silent="released",
            fuse=official,
            generating=dataclasses.replace(official, outside="exclude"),
        ),
        "difference_clean": Difference(
            rank=config.rank,
            lora_alpha=float(config.rank),
            retain_weight=config.betas[0],
            uniform="answers",
            silent="all",
            fuse=clean,
            generating=clean,
        ),
    }


def with_alpha(difference: Difference, alpha: float, filter: str) -> Difference:
    """The same assistant, taken away with another weight from other tokens."""
    changes: Any = {"alpha": alpha, "filter": filter}
    return dataclasses.replace(
        difference,
        fuse=dataclasses.replace(difference.fuse, **changes),
        generating=dataclasses.replace(difference.generating, **changes),
    )


def answer_loss(graphdef: Any, rest: Any) -> Callable[..., Any]:
    """Cross-entropy of answers' tokens, a mean over tokens: what finetuning minimises."""

    def loss_fn(params: Any, batch: Mapping[str, Any], rng: Any) -> Any:
        del rng
        model = nnx.merge(graphdef, params, rest)
        hidden, _ = model.hidden_states(batch["tokens"], segment_ids=batch.get("segment_ids"))
        weights = batch["mask"][:, 1:].astype(jnp.float32)
        loss = losses.linear_cross_entropy(
            hidden[:, :-1], model.head_of(), batch["tokens"][:, 1:], weights=weights
        )
        return loss, weights.sum(), {}

    return loss_fn


def layer_states(model: models.Decoder, layer: int, tokens: Any) -> jax.Array:
    """The residual stream after so many layers, without the final norm."""
    cut = models.first_layers(model, layer)
    cut.final_norm = _Identity()
    return cut.hidden_states(tokens)[0]


class _Identity(nnx.Module):
    def __call__(self, x: Any) -> Any:
        return x


def make_loss(
    method: unlearning.UnlearningMethod,
    graphdef: Any,
    rest: Any,
    *,
    layer: int = 1,
    direction: Any = None,
    most: Mapping[str, int] | None = None,
) -> Callable[..., Any]:
    """``loss_fn(params, batch, rng, reference)`` of a method, for `training.make_train_step`.

    Batches are those of `logitjax.unlearning.make_assistant_loss`. The retain loss counts answers'
    tokens; published codes average the divergence over prompts and padding too.

    Args:
      method: from `unlearning.UNLEARNING_METHODS`.
      graphdef: of the model.
      rest: what of it is no parameter.
      layer: after which RMU moves hidden states.
      direction: where RMU moves them.
      most: of ``forget`` and ``retain``, the most answers' tokens in any step: the head then meets
        no other positions. The loss is nan where there are more.
    """
    options: dict[str, Any] = {k: v for k, v in method.options.items() if k != "scale"}

    def loss_fn(params: Any, batch: Mapping[str, Any], rng: Any, reference: Any = None) -> Any:
        del rng
        model = nnx.merge(graphdef, params, rest)
        sides = ["forget"] if method.retain == "none" else ["forget", "retain"]
        before = nnx.merge(graphdef, reference, rest) if method.needs_reference else None
        where = {side: batch[side]["mask"][:, 1:] for side in sides}
        if method.forget_level == "hidden":
            assert before is not None
            tokens = jnp.concatenate([batch[side]["tokens"] for side in sides])
            count = len(batch["forget"]["tokens"])
            states = layer_states(model, layer, tokens)[:, 1:]
            kept = layer_states(before, layer, batch["retain"]["tokens"])[:, 1:]
            forget = method.forget(states[:count], direction)
            retain = unlearning.rmu(states[count:], kept)
            return _weighed(method, forget, where["forget"], retain, where["retain"])
        positions = {side: ops.Positions(where[side], most and most[side]) for side in sides}
        labels = {side: positions[side].pick(batch[side]["tokens"][:, 1:]) for side in sides}

        def states_of(which: models.Decoder, sides: list[str]) -> dict[str, jax.Array]:
            """Hidden states that predict answers, ``[tokens, hidden]``."""
            rows = [batch[side]["tokens"] for side in sides]
            hidden, _ = which.hidden_states(jnp.concatenate(rows))
            cuts = np.cumsum([len(r) for r in rows])[:-1]
            parts = jnp.split(hidden[:, :-1], cuts)
            return {s: positions[s].pick(part) for s, part in zip(sides, parts, strict=True)}

        head, here = model.head_of(), states_of(model, sides)
        there: dict[str, jax.Array] = {}
        theirs = head
        if before is not None:
            # NPO needs the rows to forget, the divergence those to keep.
            wanted = [] if method.forget_level == "tokens" and method.retain == "kl" else ["forget"]
            wanted += ["retain"] if method.retain == "kl" else []
            there, theirs = states_of(before, wanted), before.head_of()
        flat = losses.linear_cross_entropy(
            jnp.concatenate([here[side] for side in sides]),
            head,
            jnp.concatenate([labels[side] for side in sides]),
        )
        size = len(labels["forget"])
        forget_nll = positions["forget"].put(flat[:size])
        if method.forget is unlearning.undial:
            undial = unlearning.linear_undial(
                here["forget"], head, there["forget"], theirs, labels["forget"], **options
            )
            forget = positions["forget"].put(undial)
        elif method.forget_level == "answers":
            summed, lengths = unlearning.sequence_nll(forget_nll, where["forget"])
            second = lengths
            if method.needs_reference:
                old = losses.linear_cross_entropy(there["forget"], theirs, labels["forget"])
                second = unlearning.sequence_nll(positions["forget"].put(old), where["forget"])[0]
            forget = method.forget(summed, second, **options)
        else:
            forget = method.forget(forget_nll, **options)
        counted = where["forget"] if method.forget_level == "tokens" else None
        retain = None
        if method.retain == "kl":
            divergence = losses.linear_kl_divergence(here["retain"], head, there["retain"], theirs)
            retain = positions["retain"].put(divergence)
        elif method.retain != "none":
            retain = positions["retain"].put(flat[size:])
        loss, one, means = _weighed(method, forget, counted, retain, where.get("retain"))
        fit = jnp.stack([positions[side].fits for side in sides]).all()
        return jnp.where(fit, loss, jnp.nan), one, means

    return loss_fn


def _weighed(
    method: unlearning.UnlearningMethod, forget: Any, counted: Any, retain: Any, kept: Any
) -> Any:
    loss, means = unlearning.unlearning_objective(
        forget,
        retain,
        forget_weight=method.forget_weight,
        retain_weight=method.retain_weight,
        forget_where=counted,
        retain_where=kept,
    )
    one = jnp.float32(1)
    return loss, one, {name: (value, one) for name, value in means.items()}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Deployed:
    """What is asked: a model alone, or with an assistant.

    Attributes:
      model: its own weights.
      assistant: taken away from it, or None.
      difference: how.
      block: positions whose logits are held at a time.
    """

    model: models.Decoder
    assistant: unlearning.Assistant | None = None
    difference: Difference | None = None
    block: int = 256

    def nll(self, tokens: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
        """An `evaluation.NllFn` that says too which tokens are the most likely ones."""
        graphdef, state = nnx.split(self.model)
        base, held, lora, fuse, alpha = None, None, None, None, 0.0
        if self.assistant is not None:
            assert self.difference is not None
            base, held = nnx.split(self.assistant.base)
            lora, alpha = self.assistant.lora, self.difference.fuse.alpha
            # One program for all alphas, which the shift of the logits is proportional to.
            fuse = dataclasses.replace(self.difference.fuse, alpha=1.0)
        # Only targets meet the head, a few sizes of program for all batches.
        where = np.asarray(targets)[:, 1:]
        wanted = np.flatnonzero(where)
        at = np.full(max(1, -(-len(wanted) // self.block)) * self.block, where.size, np.int32)
        at[: len(wanted)] = wanted
        at = at.reshape(-1, self.block)
        return _nll(graphdef, base, fuse, state, held, lora, alpha, tokens, at)

    def line_up(self) -> Any:
        """For `decoding.generate`."""
        from logitjax import decoding

        if self.assistant is None:
            return decoding.Ensemble(self.model)
        assert self.difference is not None
        pair = unlearning.paired_model(self.model, self.assistant)
        return decoding.Ensemble(pair, fuse=self.difference.generating)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _nll(
    graphdef: Any,
    base: Any,
    fuse: Any,
    state: Any,
    held: Any,
    lora: Any,
    alpha: Any,
    tokens: Any,
    at: Any,
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, state)
    sides = [model.hidden_states(tokens)[0][:, :-1]]
    assistant = None
    if base is not None:
        assistant = nnx.merge(base, held)
        sides.append(assistant.hidden_states(tokens, lora=lora)[0][:, :-1])
    labels = jnp.asarray(tokens)[:, 1:]
    sides = [side.reshape(labels.size, -1) for side in sides]

    def one(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = [side.at[at].get(mode="clip") for side in sides]
        logits = model.logits(hidden[0])
        if assistant is not None:
            fused, _ = fuse(logits, assistant.logits(hidden[1])[None], None)
            logits = logits + alpha * (fused - logits)
        wanted = labels.ravel().at[at].get(mode="clip")
        label = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return ops.logsumexp(logits) - label, logits.argmax(axis=-1) == wanted

    def back(values: jax.Array) -> jax.Array:
        rows = jnp.zeros(labels.size, values.dtype).at[at].set(values, mode="drop")
        return jnp.pad(rows.reshape(labels.shape), ((0, 0), (1, 0)))

    nll, greedy = map(back, jax.lax.map(one, at))
    return nll, greedy
