import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from logitjax.fusion._inputs import Inputs, Strategy, pmax
from logitjax.ops import AxisName, checks, log_softmax


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyTuning(Strategy):
    """Adds the difference of experts and their bases, with the same weight at every token.

    With alpha = 1 this equals tuning the large model, if both learned the same log-ratio. ::

        large + alpha * sum_t (expert_t - base_t)

    Attributes:
        alpha: the weight.

    >>> fused, _ = ProxyTuning()(jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5]))
    >>> fused
    Array([ 0.5, -0.5], dtype=float32)

    References:
        Liu et al., Tuning language models by proxy, 2024 (arXiv 2401.08565). Emulated fine-tuning
        (Mitchell et al., 2023, arXiv 2310.12962) is the same distribution, normalised.
    """

    alpha: float = 1.0

    def fuse(self, inputs: Inputs, axis_name: AxisName | None) -> tuple[jax.Array, dict[str, Any]]:
        # Entries are fused independently.
        del axis_name
        return inputs.fused(inputs.large + self.alpha * inputs.differences.sum(0)), {}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class DExperts(Strategy):
    """Moves towards an expert and away from an anti-expert, within the large model's top-p set.

    The anti-expert takes the place of the base. If the vocabulary is split over devices, `top_p`
    must be 1, because it would require sorting. ::

        large + alpha * (expert - antiexpert)   where p_large is in its top-p set, -inf elsewhere

    Attributes:
        alpha: the weight.
        top_p: share of the large model's probability that its most likely tokens must reach to be
            kept; 1 keeps all.

    >>> fuse = jax.jit(DExperts(top_p=0.5))
    >>> fused, _ = fuse(jnp.array([2.0, 0.0]), jnp.zeros(2), jnp.array([1.0, 0.0]))
    >>> fused
    Array([  0., -inf], dtype=float32)

    References:
        Liu et al., DExperts, 2021 (arXiv 2105.03023).
    """

    alpha: float = 2.0
    top_p: float = 0.9

    def __post_init__(self) -> None:
        checks.between(self.top_p, 0.0, 1.0, "top_p")

    def fuse(self, inputs: Inputs, axis_name: AxisName | None) -> tuple[jax.Array, dict[str, Any]]:
        if self.top_p < 1 and axis_name is not None:
            raise ValueError(
                f"top_p={self.top_p} sorts the vocabulary, which axis_name={axis_name!r} splits: "
                "gather the large model's logits or give top_p=1"
            )
        fused = inputs.fused(inputs.large + self.alpha * inputs.differences.sum(0))
        if self.top_p < 1:
            probs = jnp.exp(log_softmax(inputs.large, vocab_where=inputs.exists))
            descending = -jnp.sort(-probs, axis=-1)
            before = jnp.cumsum(descending, axis=-1) - descending
            # The likeliest token always stays.
            kept = before < max(self.top_p, 1e-9)
            least = jnp.where(kept, descending, jnp.inf).min(-1, keepdims=True)
            # Not `probs >= least`: nan would be excluded, and the argmax of the row meaningless.
            fused = jnp.where(probs < least, -jnp.inf, fused)
        return fused, {}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveDecoding(Strategy):
    """Prefers tokens that the large model finds more likely than an amateur, among plausible ones.

    The amateur is passed as the base; there are no experts. ::

        weight * large - amateur_weight * amateur   where p_large >= plausibility * max p_large

    Attributes:
        weight: weight of the large model.
        amateur_weight: weight of the amateur.
        plausibility: least probability as a fraction of the largest; 0 keeps all.

    >>> fuse = jax.jit(ContrastiveDecoding())
    >>> fused, _ = fuse(jnp.array([2.0, 1.0, -9.0]), None, jnp.array([2.0, 0.0, 0.0]))
    >>> fused
    Array([  2. ,   1.5, -inf], dtype=float32)

    References:
        Li et al., Contrastive decoding, 2023 (arXiv 2210.15097): both weights 1. O'Brien and Lewis,
        Contrastive decoding improves reasoning, 2023 (arXiv 2309.09117): 1.5 and 0.5, the defaults.
    """

    takes_experts: ClassVar[bool] = False

    weight: float = 1.5
    amateur_weight: float = 0.5
    plausibility: float = 0.1

    def __post_init__(self) -> None:
        checks.between(self.plausibility, 0.0, 1.0, "plausibility")

    def fuse(self, inputs: Inputs, axis_name: AxisName | None) -> tuple[jax.Array, dict[str, Any]]:
        if len(inputs.bases) != 1:
            raise ValueError(f"logits_bases: expected one amateur, got {len(inputs.bases)}")
        fused = inputs.fused(self.weight * inputs.large - self.amateur_weight * inputs.bases[0])
        if self.plausibility > 0:
            large = inputs.fused(inputs.large)
            peak = pmax(large.max(-1, keepdims=True), axis_name)
            least = peak + jnp.log(checks.as_float(jnp.array([self.plausibility]), "plausibility"))
            fused = jnp.where(large < least, -jnp.inf, fused)
        return fused, {}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance(Strategy):
    """Amplifies the effect of a prompt, or of a context in it; the base reads the text without it.

    Usually the base is the same model with another prompt. In log-probabilities::

        base + weight * (large - base)

    Attributes:
        weight: 1 is the large model alone; called 1 + alpha in context-aware decoding.

    Raises:
        ValueError: when called with any number of bases except one.

    >>> fused, _ = jax.jit(Guidance(weight=2.0))(jnp.zeros(2), None, jnp.log(jnp.array([0.8, 0.2])))
    >>> [f"{p:.2f}" for p in jax.nn.softmax(fused)]
    ['0.20', '0.80']

    References:
        Sanchez et al., Stay on topic with classifier-free guidance, 2023 (arXiv 2306.17806): 1.5.
        Shi et al., Context-aware decoding, 2023 (arXiv 2305.14739): alpha 0.5, and 1 where the
        context contradicts what was learned.
    """

    takes_experts: ClassVar[bool] = False

    weight: float = 1.5

    def fuse(self, inputs: Inputs, axis_name: AxisName | None) -> tuple[jax.Array, dict[str, Any]]:
        # A constant added to either model's logits changes no probability, so none are normalised.
        del axis_name
        if len(inputs.bases) != 1:
            raise ValueError(f"logits_bases: expected one, got {len(inputs.bases)}")
        base = inputs.bases[0]
        return inputs.fused(base + self.weight * (inputs.large - base)), {}
