"""Training the assistant of a logit difference: adapters on the first layers of a frozen model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.models import Decoder
from logitjax.ops import Positions
from logitjax.training import LossFn
from logitjax.unlearning._linear_losses import linear_assistant_objective
from logitjax.unlearning.assistant._assistant import relative_states


def make_assistant_loss(
    base: Decoder,
    *,
    retain_weight: float = 1.0,
    uniform: str = "answers",
    max_positions: int | None = None,
    relative: bool = False,
) -> tuple[LossFn, Any]:
    """The loss of an assistant's adapters, for `TrainStep`.

    The assistant learns what is to be forgotten, and to be silent about what is to be kept::

        mean_{forget answers} -log p(y) + beta mean_{retain} KL(uniform || p)

    Each step takes one batch to forget and one to keep, of constant shapes. Both run as one batch,
    and one sweep over blocks of the vocabulary gives the value and its gradient. There are no
    logits `[rows, time, vocab]`, no gradient of the head, no pass of the large model, and no
    reference model. The frozen weights are constants of the step, so none of them is copied or
    donated.

    Batches are `{"forget": {"tokens", "mask"}, "retain": {"tokens", "mask"}}`: int32 and bool
    `[rows, time]`, padded at the end, `mask` True at the tokens of the answers.

    Args:
        base: the base of a `logitjax.unlearning.Assistant`, whose arrays are the large model's.
        retain_weight: beta, 6.5 in the paper and 5 in its code. With these a small assistant learns
            silence first, and little of what is to be forgotten; 0.5, 1 and 2 are alike
            (docs/unlearning.md).
        uniform: where it has to be silent: where it predicts tokens of `'answers'`, or at `'all'`
            positions, prompt and padding included, as in the released code.
        max_positions: the largest number of positions that count in any step, if known. The head,
            most of a small assistant's work, then runs at no others. All positions when None. The
            loss of a step with more such positions is nan.
        relative: the assistant's logits are what its adapters add, see `Assistant`. Each step then
            also takes a pass of the layers without adapters.

    Returns:
        `loss_fn(lora, batch, rng, constants)`, a mean with a count of 1, and the constants.

    Raises:
        ValueError: `uniform` is neither, `max_positions` is not positive, or the head is not
            linear but for a soft cap.

    >>> from logitjax.models import DecoderConfig
    >>> from logitjax.unlearning import Assistant
    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> target = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0), layout="listed"))()
    >>> assistant = Assistant.init(target, 1, rank=2, key=jax.random.key(0))
    >>> loss_fn, constants = make_assistant_loss(assistant.base)
    >>> rows = {"tokens": jnp.array([[1, 2, 3]]), "mask": jnp.array([[False, True, True]])}
    >>> batch = {"forget": rows, "retain": rows}
    >>> loss, count, parts = jax.jit(loss_fn)(assistant.lora, batch, None, constants)
    >>> loss.shape, sorted(parts)
    ((), ['forget', 'retain'])

    References:
        Ji et al., Reversing the forget-retain objectives, 2024 (arXiv 2406.08607), eqs. 3-5. The
        release splits each micro-batch by a label and counts a missing side as 0; it has dropout of
        0.05 on the adapters' inputs, which this has not.
    """
    if uniform not in ("answers", "all"):
        raise ValueError(f"uniform: expected 'answers' or 'all', got {uniform!r}")
    if max_positions is not None and max_positions < 1:
        raise ValueError(f"max_positions: expected a positive number, got {max_positions}")
    graphdef, params, rest = nnx.split(base, nnx.Param, ...)
    # Raises now where the head is not linear; a model of shapes alone has no arrays to ask.
    jax.eval_shape(lambda params: nnx.merge(graphdef, params, rest).head_of(), params)

    def loss_fn(
        lora: Any, batch: Mapping[str, Any], rng: Any, constants: Any
    ) -> tuple[Any, Any, dict[str, tuple[Any, Any]]]:
        del rng
        model = nnx.merge(graphdef, constants, rest)
        tokens, answers, retain = together(batch)
        if relative:
            hidden = relative_states(model, lora, tokens)
        else:
            hidden, _ = model.hidden_states(tokens, lora=lora)
        labels, where = next_tokens(tokens, answers)
        if uniform == "all":
            where = where | retain[:, None]
        retain = jnp.broadcast_to(retain[:, None], tokens.shape)
        positions = Positions(where, max_positions)
        hidden, labels, retain = map(positions.pick, (hidden, labels, retain))
        loss, parts = linear_assistant_objective(
            hidden,
            model.head_of(),
            labels,
            retain,
            where=positions.counted,
            retain_weight=retain_weight,
        )
        loss = jnp.where(positions.fits, loss, jnp.nan)
        one = jnp.float32(1)
        return loss, one, {name: (value, one) for name, value in parts.items()}

    return loss_fn, nnx.to_pure_dict(params)


def together(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows to forget, then rows to keep: tokens, answers, and which rows are to be kept."""
    sides = [batch["forget"], batch["retain"]]
    tokens, answers = (
        jnp.concatenate([jnp.asarray(side[name]) for side in sides]) for name in ("tokens", "mask")
    )
    return tokens, answers, jnp.arange(len(tokens)) >= len(sides[0]["tokens"])


def next_tokens(tokens: Any, answers: Any) -> tuple[jax.Array, jax.Array]:
    """What each position predicts, and where that is a token of the answer."""
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return labels, jnp.pad(jnp.asarray(answers)[:, 1:], ((0, 0), (0, 1)))
