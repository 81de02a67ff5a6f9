"""SimNPO: negative preference by likelihood per token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.ops import Array, checks
from logitjax.unlearning._losses import as_losses, preference
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimNPO(TwoSided):
    """Negative preference by likelihood per token, without a model before.

    The loss is `-(2 / beta) log sigmoid(beta (n / |y| - delta))`, n summed over an answer's tokens.

    Attributes:
        beta: Inverse temperature.
        delta: Likelihood loss per token at which an answer counts as forgotten.

    References:
        Fan et al., Simplicity prevails, 2024 (arXiv 2410.07163). OpenUnlearning's `SimNPO` has
        these defaults; the authors use beta 2.5 and weights of 0.1375 and 1 on forget05.
    """

    forget_weight: float = 0.125
    retain: str = "nll"
    beta: float = 4.5
    delta: float = 0.0

    peak = 1e-2
    reads = (Need("forget", "nll"),)

    def values(
        self, nll: Float[Array, "*batch"], lengths: Int[Array, "*batch"]
    ) -> Float[jax.Array, "*batch"]:
        """Losses of answers with these summed negative log-likelihoods and numbers of tokens.

        >>> print(f"{SimNPO(beta=2.5).values(jnp.array(2.0), jnp.array(4)):.4f}")
        0.2015
        """
        nll, lengths = as_losses(nll, "nll"), jnp.asarray(lengths)
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
        checks.shapes(nll=(nll, "any *same"), lengths=(lengths, "any *same"))
        # An answer without a token, which no mean counts, is not 0 / 0.
        return preference(nll / jnp.maximum(lengths, 1) - self.delta, self.beta)

    def forget(self, read: Read) -> Any:
        return self.values(read.answer_nll("forget"), read.where("forget").sum(-1)), None
