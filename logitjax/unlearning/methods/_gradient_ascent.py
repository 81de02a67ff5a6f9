"""Gradient ascent, and WGA, whose weight fades."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.unlearning._losses import as_losses
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAscent(TwoSided):
    """Gradient ascent on tokens; with a retain loss gradient difference, with beta WGA.

    The loss is `-p^beta nll`, p = exp(-nll). The weight is a constant for the gradient, as in WGA's
    code. Without a beta there is no bound.

    Attributes:
        beta: How soon the weight of a token fades as it becomes unlikely; 1 in WGA.

    References:
        Maini et al., TOFU, 2024 (arXiv 2401.06121), section 4. Wang et al., Rethinking LLM
        unlearning objectives, 2025 (arXiv 2502.19301); OpenUnlearning's `WGA`.
    """

    beta: float = 0.0

    reads = (Need("forget", "nll"),)

    def values(self, nll: Float[Array, "*batch"]) -> Float[jax.Array, "*batch"]:
        """Losses of tokens with these negative log-likelihoods, of which `inf` gives the limit.

        >>> GradientAscent().values(jnp.array([0.5, 2.0]))
        Array([-0.5, -2. ], dtype=float32)
        """
        nll = as_losses(nll, "nll")
        # Has a limit: without a weight -inf, else 0.
        infinite = nll == jnp.inf
        finite = jnp.where(infinite, 0.0, nll)
        weight = jax.lax.stop_gradient(jnp.exp(-self.beta * finite))
        return jnp.where(infinite, 0.0 if self.beta > 0 else -jnp.inf, -weight * finite)

    def forget(self, read: Read) -> Any:
        return self.values(read.nll("forget")), read.where("forget")
