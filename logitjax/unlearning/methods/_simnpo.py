"""SimNPO: negative preference by likelihood per token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.ops import Array, Number, checks
from logitjax.unlearning._losses import as_losses, preference, sequence_nll
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read


def simnpo(
    nll: Float[Array, "*batch"],
    lengths: Int[Array, "*batch"],
    *,
    beta: float | int = 4.5,
    delta: Number = 0.0,
) -> Float[jax.Array, "*batch"]:
    """SimNPO: negative preference by likelihood per token, without a reference model.

    ::

        -(2 / beta) log sigmoid( beta (n / |y| - delta) )

    Args:
        nll: `[*batch]`, summed over each answer's tokens: `sequence_nll`.
        lengths: `[*batch]`, tokens of each answer; none counts as one.
        beta: inverse temperature.
        delta: likelihood loss per token at which an answer counts as forgotten.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: `nll` is not floating point or `lengths` not integers.
        ValueError: different shapes, or `beta` is not positive.

    >>> print(f"{simnpo(jnp.array(2.0), jnp.array(4), beta=2.5):.4f}")
    0.2015

    References:
        Fan et al., Simplicity prevails, 2024 (arXiv 2410.07163). OpenUnlearning's `SimNPO`: beta
        4.5, delta 0, and weights of 0.125 and 1 for it and the retain loss; the authors use beta
        2.5 and 0.1375 on forget05.
    """
    nll = as_losses(nll, "nll")
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    checks.same_shape(nll, lengths, "nll", "lengths")
    return preference(nll / jnp.maximum(lengths, 1) - delta, beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimNPO(TwoSided):
    """Negative preference by likelihood per token, without a model before.

    Attributes:
        beta: Inverse temperature.
        delta: Likelihood loss per token at which an answer counts as forgotten.
    """

    forget_weight: float = 0.125
    retain: str = "nll"
    beta: float = 4.5
    delta: float = 0.0

    peak = 1e-2
    reads = (Need("forget", "nll"),)

    def forget(self, read: Read) -> Any:
        nll, lengths = sequence_nll(read.nll("forget"), read.where("forget"))
        return simnpo(nll, lengths, beta=self.beta, delta=self.delta), None
