"""Gradient ascent, and WGA, whose weight fades."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.ops import Array, Number
from logitjax.unlearning._losses import as_losses
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read


def gradient_ascent(
    nll: Float[Array, "*batch"], *, beta: Number = 0.0
) -> Float[jax.Array, "*batch"]:
    """Make what is to be forgotten less likely: minus its likelihood loss, without a bound.

    With `beta` it is WGA, whose weight fades as a token becomes unlikely. The weight is a constant
    for the gradient, as in the authors' code.

    ::

        -p^beta nll,    p = exp(-nll)

    Args:
        nll: `[*batch]`, of tokens; the published mean is over the tokens of all answers together.
            `inf` gives the limit: `-inf`, with a positive `beta` 0.
        beta: how soon the weight fades; 1 in WGA.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: `nll` is not floating point.

    >>> gradient_ascent(jnp.array([0.5, 2.0]))
    Array([-0.5, -2. ], dtype=float32)
    >>> weighted = jax.jit(gradient_ascent)(jnp.array([0.0, 0.6931472, 200.0]), beta=1.0)
    >>> [f"{loss:.4f}" for loss in weighted.tolist()]
    ['-0.0000', '-0.3466', '-0.0000']

    References:
        Maini et al., TOFU, 2024 (arXiv 2401.06121), section 4. Wang et al., Rethinking LLM
        unlearning objectives, 2025 (arXiv 2502.19301); OpenUnlearning's `WGA`.
    """
    nll = as_losses(nll, "nll")
    gone = nll == jnp.inf
    finite = jnp.where(gone, 0.0, nll)
    weight = jax.lax.stop_gradient(jnp.exp(-beta * finite))
    return jnp.where(gone, jnp.where(beta > 0, 0.0, -jnp.inf), -weight * finite)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAscent(TwoSided):
    """Gradient ascent on tokens; with a retain loss gradient difference, with beta WGA.

    Attributes:
        beta: How soon the weight of a token fades as it becomes unlikely; 1 in WGA.
    """

    beta: float = 0.0

    reads = (Need("forget", "nll"),)

    def forget(self, read: Read) -> Any:
        return gradient_ascent(read.nll("forget"), beta=self.beta), read.where("forget")
