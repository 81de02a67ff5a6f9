"""The arms of unlearning: what each minimises, all from hidden states."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax import fusion, losses, models, ops

#: Arms that train the model's own weights, by the names of `losses.UNLEARNING_METHODS`.
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
      fuse: while a text is scored; keeps what it leaves out.
      generating: while one is generated.
    """

    rank: int
    lora_alpha: float
    retain_weight: float
    uniform: str
    fuse: fusion.LogitDifference
    generating: fusion.LogitDifference


def differences(config: Any) -> dict[str, Difference]:
    """Arms that leave the model's weights alone.

    ``official`` is the released code: rank 16, beta 5, silence at all positions, the int(0.01 V)
    most likely tokens changed by raw logits with weight 0.8, nothing else generated. ``clean`` has
    the paper's rank and beta, silence on answers, centred logits for tokens with a hundredth of the
    largest probability or more; others keep the target's logit while generating too. Were they
    excluded, a confident target would have one token left to choose from, and forget nothing.
    """
    official = fusion.LogitDifference(alpha=0.8, form="raw", filter="official", rate=0.01)
    clean = fusion.LogitDifference(alpha=config.alpha)
    return {
        "difference_official": Difference(
            rank=config.rank // 2,
            lora_alpha=float(config.rank),
            retain_weight=5.0,
            uniform="all",
            fuse=official,
            generating=dataclasses.replace(official, outside="exclude"),
        ),
        "difference_clean": Difference(
            rank=config.rank,
            lora_alpha=float(config.rank),
            retain_weight=config.beta,
            uniform="answers",
            fuse=clean,
            generating=clean,
        ),
    }


def with_alpha(difference: Difference, alpha: float) -> Difference:
    return dataclasses.replace(
        difference,
        fuse=dataclasses.replace(difference.fuse, alpha=alpha),
        generating=dataclasses.replace(difference.generating, alpha=alpha),
    )


def head_arguments(model: Any) -> dict[str, Any]:
    """A model's head as keyword arguments of the ``losses.linear_...`` functions."""
    kernel, bias, vocab_axis = model.head_kernel()
    return {"head": kernel, "bias": bias, "vocab_axis": vocab_axis}


def answer_loss(graphdef: Any, rest: Any) -> Callable[..., Any]:
    """Cross-entropy of answers' tokens, a mean over tokens: what finetuning minimises."""

    def loss_fn(params: Any, batch: Mapping[str, Any], rng: Any) -> Any:
        del rng
        model = nnx.merge(graphdef, params, rest)
        hidden, _ = model.hidden_states(batch["tokens"], segment_ids=batch.get("segment_ids"))
        weights = batch["mask"][:, 1:].astype(jnp.float32)
        loss = losses.linear_cross_entropy(
            hidden[:, :-1],
            labels=batch["tokens"][:, 1:],
            token_weights=weights,
            **head_arguments(model),
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
    method: losses.UnlearningMethod,
    graphdef: Any,
    rest: Any,
    *,
    layer: int = 1,
    direction: Any = None,
) -> Callable[..., Any]:
    """``loss_fn(params, batch, rng, reference)`` of a method, for `training.make_train_step`.

    Batches are those of `logitjax.training.make_assistant_loss`. The retain loss counts answers'
    tokens; published codes average the divergence over prompts and padding too.

    Args:
      method: from `losses.UNLEARNING_METHODS`.
      graphdef: of the model.
      rest: what of it is no parameter.
      layer: after which RMU moves hidden states.
      direction: where RMU moves them.
    """
    forget_loss = getattr(losses, method.forget)
    options = {k: v for k, v in method.options.items() if k != "scale"}

    def loss_fn(params: Any, batch: Mapping[str, Any], rng: Any, reference: Any = None) -> Any:
        del rng
        model = nnx.merge(graphdef, params, rest)
        sides = ["forget"] if method.retain == "none" else ["forget", "retain"]
        tokens = jnp.concatenate([batch[side]["tokens"] for side in sides])
        count = len(batch["forget"]["tokens"])
        before = nnx.merge(graphdef, reference, rest) if method.needs_reference else None
        labels = tokens[:, 1:]
        where = {side: batch[side]["mask"][:, 1:] for side in sides}
        if method.forget_level == "hidden":
            assert before is not None
            states = layer_states(model, layer, tokens)[:, 1:]
            kept = layer_states(before, layer, batch["retain"]["tokens"])[:, 1:]
            forget = forget_loss(states[:count], direction)
            retain = losses.rmu(states[count:], kept)
            return _weighed(method, forget, where["forget"], retain, where["retain"])
        hidden, _ = model.hidden_states(tokens)
        head, hidden = head_arguments(model), hidden[:, :-1]
        there = theirs = None
        if before is not None:
            # NPO needs the rows to forget, the divergence those to keep.
            rows = slice(
                count if method.forget_level == "tokens" and method.retain == "kl" else 0,
                None if method.retain == "kl" else count,
            )
            there = before.hidden_states(tokens[rows])[0][:, :-1]
            theirs = head_arguments(before)
        nll = losses.linear_cross_entropy(hidden, labels=labels, **head)
        if method.forget == "undial":
            assert there is not None
            assert theirs is not None
            forget = losses.linear_undial(
                hidden[:count],
                reference_hidden=there[:count],
                reference_head=theirs["head"],
                reference_vocab_axis=theirs["vocab_axis"],
                labels=labels[:count],
                **head,
                **options,
            )
        elif method.forget_level == "answers":
            summed, lengths = losses.sequence_nll(nll[:count], where["forget"])
            second = lengths
            if method.needs_reference:
                assert there is not None
                assert theirs is not None
                old = losses.linear_cross_entropy(there[:count], labels=labels[:count], **theirs)
                second = losses.sequence_nll(old, where["forget"])[0]
            forget = forget_loss(summed, second, **options)
        else:
            forget = forget_loss(nll[:count], **options)
        counted = where["forget"] if method.forget_level == "tokens" else None
        if method.retain == "none":
            return _weighed(method, forget, counted, None, None)
        retain = nll[count:]
        if method.retain == "kl":
            assert there is not None
            assert theirs is not None
            retain = losses.linear_kl_divergence(
                hidden[count:],
                teacher_hidden=there[-len(hidden[count:]) :],
                teacher_head=theirs["head"],
                teacher_vocab_axis=theirs["vocab_axis"],
                **head,
            )
        return _weighed(method, forget, counted, retain, where["retain"])

    return loss_fn


def _weighed(
    method: losses.UnlearningMethod, forget: Any, counted: Any, retain: Any, kept: Any
) -> Any:
    loss, means = losses.unlearning_objective(
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
    assistant: models.Assistant | None = None
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
        return _nll(graphdef, base, fuse, self.block, state, held, lora, alpha, tokens, targets)

    def line_up(self) -> Any:
        """For `decoding.generate`."""
        from logitjax import decoding

        if self.assistant is None:
            return decoding.Ensemble(self.model)
        assert self.difference is not None
        pair = decoding.paired_model(self.model, self.assistant)
        return decoding.Ensemble(pair, fuse=self.difference.generating)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _nll(
    graphdef: Any,
    base: Any,
    fuse: Any,
    block: int,
    state: Any,
    held: Any,
    lora: Any,
    alpha: Any,
    tokens: Any,
    targets: Any,
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, state)
    sides = [model.hidden_states(tokens)[0][:, :-1]]
    assistant = None
    if base is not None:
        assistant = nnx.merge(base, held)
        sides.append(assistant.hidden_states(tokens, lora=lora)[0][:, :-1])
    labels = jnp.asarray(tokens)[:, 1:]

    def one(args: Any) -> tuple[jax.Array, jax.Array]:
        *hidden, labels = args
        logits = model.logits(hidden[0])
        if assistant is not None:
            fused, _ = fuse(logits, assistant.logits(hidden[1])[None], None)
            logits = logits + alpha * (fused - logits)
        label = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return ops.logsumexp(logits) - label, logits.argmax(axis=-1) == labels

    def blocks(values: jax.Array) -> jax.Array:
        flat = values.reshape(-1, *values.shape[2:])
        flat = jnp.pad(flat, [(0, -len(flat) % block)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(-1, block, *flat.shape[1:])

    found = jax.lax.map(one, tuple(map(blocks, (*sides, labels))))
    nll, greedy = (
        jnp.pad(leaf.reshape(-1)[: labels.size].reshape(labels.shape), ((0, 0), (1, 0)))
        for leaf in found
    )
    return jnp.where(targets, nll, 0.0), greedy & targets
