"""SatImp: gradient ascent on tokens that are likely but not certain."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.unlearning._losses import as_losses
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read
from logitjax.unlearning.methods._gradient_ascent import GradientAscent


@dataclasses.dataclass(frozen=True, kw_only=True)
class SatImp(TwoSided):
    """Gradient ascent on tokens that are likely but not certain.

    The loss is `-p^beta1 (1 - p)^beta2 nll`, p = exp(-nll). The weight is a constant for the
    gradient, and largest at `p = beta1 / (beta1 + beta2)`.

    Attributes:
        beta1: How soon the weight fades as a token becomes unlikely.
        beta2: How much smaller the weight of a nearly certain token is; 0 is WGA.

    References:
        Yang et al., Exploring criteria of loss reweighting to enhance LLM unlearning, 2025 (arXiv
        2505.11953); OpenUnlearning's `SatImp`.
    """

    forget_weight: float = 0.1
    retain: str = "nll"
    beta1: float = 5.0
    beta2: float = 1.0

    peak = 1e-2
    reads = (Need("forget", "nll"),)

    def values(self, nll: Float[Array, "*batch"]) -> Float[jax.Array, "*batch"]:
        """Losses of tokens with these negative log-likelihoods, of which `inf` gives 0.

        >>> [f"{loss:.4g}" for loss in SatImp().values(jnp.array([0.1, 3.0])).tolist()]
        ['-0.005772', '-8.72e-07']
        """
        # 1 - exp(-nll) would be 0 of a token that is nearly certain.
        unsure = -jnp.expm1(-as_losses(nll, "nll"))
        faded = GradientAscent(beta=self.beta1).values(nll)
        return jax.lax.stop_gradient(unsure**self.beta2) * faded

    def forget(self, read: Read) -> Any:
        return self.values(read.nll("forget")), read.where("forget")
