"""What an unlearning step minimises: a loss on the data to forget and one on the data to keep."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from logitjax.ops import Array, Number, masked_mean
from logitjax.unlearning._losses import (
    as_losses,
    dpo,
    gradient_ascent,
    npo,
    satimp,
    simnpo,
)
from logitjax.unlearning._targets import ce_u, pdu, rmu, undial


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearningMethod:
    """How a method is put together, as OpenUnlearning configures it.

    Attributes:
        forget: the loss on what is to be forgotten.
        forget_level: of what that starts at: `'tokens'`, whole `'answers'`, or `'hidden'`
            states of one layer.
        forget_weight: gamma.
        retain: loss on the data to keep: their likelihood `'nll'`, the divergence `'kl'` from the
            model before (`kl_divergence` or `linear_kl_divergence` of its logits, forward), the
            distance of its `'hidden'` states (`rmu`), or `'none'`.
        retain_weight: alpha.
        options: keyword arguments of the forget loss (`scale` is `rmu_direction`'s).
        needs_reference: whether the model before unlearning takes part.
        instead: what is to be said in place of an answer to forget, for `dpo`: a `'refusal'`, or an
            answer that the model `'invents'`; else `'nothing'`.
        dual_step: if positive the retain loss is a constraint, and the retain weight the first
            value of its multiplier, which grows by so much times what the loss is above its bound,
            a step, and never below 0.
        strength: what the change of the weights is multiplied by in the end: -1 for a task vector,
            which is learnt and taken away.
        learning_rate: learning rate of AdamW, with a warm-up of one epoch and weight decay 0.01.
        epochs: over the data to forget, 32 answers a step.
    """

    forget: Callable[..., jax.Array]
    forget_level: Literal["tokens", "answers", "hidden"]
    forget_weight: float = 1.0
    retain: Literal["none", "nll", "kl", "hidden"] = "nll"
    retain_weight: float = 1.0
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    needs_reference: bool = False
    instead: Literal["nothing", "refusal", "invents"] = "nothing"
    dual_step: float = 0.0
    strength: float = 1.0
    learning_rate: float = 1e-5
    epochs: int = 10


_ASCENT = UnlearningMethod(
    forget=gradient_ascent, forget_level="tokens", retain="none", retain_weight=0.0
)
_NPO = UnlearningMethod(
    forget=npo,
    forget_level="answers",
    retain="none",
    retain_weight=0.0,
    options={"beta": 0.1},
    needs_reference=True,
)
_WITH_NLL: Any = {"retain": "nll", "retain_weight": 1.0}
_WITH_KL: Any = {"retain": "kl", "retain_weight": 1.0, "needs_reference": True}

# OpenUnlearning (arXiv 2506.12618), configs/trainer; what it calls NPO is npo_gradient_difference.
UNLEARNING_METHODS: Mapping[str, UnlearningMethod] = types.MappingProxyType(
    {
        "gradient_ascent": _ASCENT,
        "gradient_difference": dataclasses.replace(_ASCENT, **_WITH_NLL),
        "gradient_ascent_kl": dataclasses.replace(_ASCENT, **_WITH_KL),
        "npo": _NPO,
        "npo_gradient_difference": dataclasses.replace(_NPO, **_WITH_NLL),
        "npo_kl": dataclasses.replace(_NPO, **_WITH_KL),
        "simnpo": UnlearningMethod(
            forget=simnpo,
            forget_level="answers",
            forget_weight=0.125,
            options={"beta": 4.5, "delta": 0.0},
        ),
        "idk_dpo": dataclasses.replace(_NPO, forget=dpo, instead="refusal", **_WITH_NLL),
        # arXiv 2409.13474: five invented answers to each question.
        "alt_po": dataclasses.replace(
            _NPO, forget=dpo, instead="invents", epochs=2, learning_rate=2e-5, **_WITH_NLL
        ),
        "rmu": UnlearningMethod(
            forget=rmu,
            forget_level="hidden",
            retain="hidden",
            options={"scale": 2.0},
            needs_reference=True,
        ),
        "undial": UnlearningMethod(
            forget=undial,
            forget_level="tokens",
            retain="none",
            retain_weight=0.0,
            options={"beta": 10.0},
            needs_reference=True,
            learning_rate=1e-4,
        ),
        "wga": UnlearningMethod(
            forget=gradient_ascent,
            forget_level="tokens",
            options={"beta": 1.0},
            epochs=5,
        ),
        "satimp": UnlearningMethod(
            forget=satimp,
            forget_level="tokens",
            forget_weight=0.1,
            options={"beta1": 5.0, "beta2": 1.0},
            epochs=5,
        ),
        "ce_u": UnlearningMethod(
            forget=ce_u, forget_level="tokens", retain="none", retain_weight=0.0
        ),
        # Its README says 50 to 100, its configuration 1; a warm-up of five epochs is left to the
        # caller, and so is the bound, which has to be somewhat above the loss before.
        "pdu": UnlearningMethod(
            forget=pdu, forget_level="tokens", retain_weight=50.0, dual_step=1.0
        ),
        # Of MUSE (arXiv 2407.06460), as in Ilharco et al. (arXiv 2212.04089).
        "task_vector": dataclasses.replace(_ASCENT, forget_weight=-1.0, strength=-1.0),
    }
)


def unlearning_objective(
    forget_losses: Float[Array, "..."],
    retain_losses: Float[Array, "..."] | None = None,
    *,
    forget_weight: Number = 1.0,
    retain_weight: Number = 1.0,
    forget_where: Bool[Array, "..."] | None = None,
    retain_where: Bool[Array, "..."] | None = None,
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """The weighted sum of a mean forget loss and a mean retain loss.

    Gradient difference is `gradient_ascent` with the retain tokens' likelihood loss. The assistant
    of a logit difference reverses both: likelihood on what is to be forgotten, and `uniform_kl` on
    what is to be kept (`make_assistant_loss` computes it in one sweep over the head).

    ::

        gamma mean(forget_losses) + alpha mean(retain_losses)

    Args:
        forget_losses: any shape, such as `npo` of answers or `gradient_ascent` of tokens.
        retain_losses: any shape: `cross_entropy` of the tokens to keep, or `kl_divergence` from the
            model before unlearning ("KL-retain"). None for methods without.
        forget_weight: gamma.
        retain_weight: alpha.
        forget_where: boolean, the entries that count; all when None.
        retain_where: likewise. Published codes average the divergence over all positions, prompt
            and padding included; give the tokens of the answers to leave those out.

    Returns:
        The float32 scalar, and both means: `{"forget", "retain"}`.

    Raises:
        TypeError: losses are not floating point or masks not boolean.
        ValueError: a mask does not broadcast.

    >>> objective = jax.jit(unlearning_objective)
    >>> loss, means = objective(jnp.array([-1.0, -3.0]), jnp.ones(5), retain_weight=0.5)
    >>> float(loss), float(means["forget"])
    (-1.5, -2.0)

    References:
        OpenUnlearning's `GradDiff` and what derives from it.
    """
    forget = masked_mean(as_losses(forget_losses, "forget_losses"), forget_where)
    if retain_losses is None:
        return jnp.asarray(forget_weight * forget), {"forget": forget}
    retain = masked_mean(as_losses(retain_losses, "retain_losses"), retain_where)
    loss = forget_weight * forget + retain_weight * retain
    return jnp.asarray(loss), {"forget": forget, "retain": retain}
