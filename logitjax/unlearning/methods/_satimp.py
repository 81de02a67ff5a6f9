"""SatImp: gradient ascent on tokens that are likely but not certain."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.ops import Array, Number
from logitjax.unlearning._losses import as_losses
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read
from logitjax.unlearning.methods._gradient_ascent import gradient_ascent


def satimp(
    nll: Float[Array, "*batch"], *, beta1: Number = 5.0, beta2: Number = 1.0
) -> Float[jax.Array, "*batch"]:
    """SatImp: gradient ascent on tokens that are likely but not certain.

    The weight is a constant for the gradient. It is largest at `p = beta1 / (beta1 + beta2)`; with
    `beta2` of 0 it is that of WGA.

    ::

        -p^beta1 (1 - p)^beta2 nll,    p = exp(-nll)

    Args:
        nll: `[*batch]`, of tokens. `inf` gives the limit, 0 with a positive `beta1`.
        beta1: how soon the weight fades as a token becomes unlikely.
        beta2: how much smaller the weight of a nearly certain token is.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: `nll` is not floating point.

    >>> losses = jax.jit(satimp)(jnp.array([0.1, 0.6931472, 3.0]))
    >>> [f"{loss:.4g}" for loss in losses.tolist()]
    ['-0.005772', '-0.01083', '-8.72e-07']

    References:
        Yang et al., Exploring criteria of loss reweighting to enhance LLM unlearning, 2025 (arXiv
        2505.11953); OpenUnlearning's `SatImp`.
    """
    weighted = gradient_ascent(nll, beta=beta1)
    # 1 - exp(-nll) would be 0 of a token that is nearly certain.
    unsure = -jnp.expm1(-as_losses(nll, "nll"))
    return jax.lax.stop_gradient(unsure**beta2) * weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class SatImp(TwoSided):
    """Gradient ascent on tokens that are likely but not certain.

    Attributes:
        beta1: How soon the weight fades as a token becomes unlikely.
        beta2: How much smaller the weight of a nearly certain token is.
    """

    forget_weight: float = 0.1
    retain: str = "nll"
    beta1: float = 5.0
    beta2: float = 1.0

    peak = 1e-2
    reads = (Need("forget", "nll"),)

    def forget(self, read: Read) -> Any:
        values = satimp(read.nll("forget"), beta1=self.beta1, beta2=self.beta2)
        return values, read.where("forget")
