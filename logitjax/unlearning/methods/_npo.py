"""NPO: negative preference optimisation."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.unlearning._losses import above_reference, preference
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read


@dataclasses.dataclass(frozen=True, kw_only=True)
class NPO(TwoSided):
    """Negative preference optimisation: gradient ascent that fades as an answer is forgotten.

    The loss is `-(2 / beta) log sigmoid(beta (n - n_ref))`, n summed over an answer's tokens. It is
    bounded from below, unlike gradient ascent, which it becomes as `beta` goes to 0.

    Attributes:
        beta: Inverse temperature.

    References:
        Zhang et al., Negative preference optimization, 2024 (arXiv 2404.05868). OpenUnlearning's
        `NPO`: beta 0.1 in its configuration (1 in its class).
    """

    beta: float = 0.1

    reads = (Need("forget", "nll"), Need("forget", "nll", before=True))  # n and n_ref

    def values(
        self, nll: Float[Array, "*batch"], reference_nll: Float[Array, "*batch"]
    ) -> Float[jax.Array, "*batch"]:
        """Losses of answers with these summed negative log-likelihoods, now and before.

        >>> print(f"{NPO().values(jax.numpy.array(30.0), jax.numpy.array(10.0)):.4f}")
        2.5386
        """
        return preference(above_reference(nll, reference_nll, "nll"), self.beta)

    def forget(self, read: Read) -> Any:
        return self.values(*(read.answer_nll("forget", before=b) for b in (False, True))), None
