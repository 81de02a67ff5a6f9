"""NPO: negative preference optimisation."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.unlearning._losses import above_reference, preference, sequence_nll
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read


def npo(
    nll: Float[Array, "*batch"],
    reference_nll: Float[Array, "*batch"],
    *,
    beta: float | int = 0.1,
) -> Float[jax.Array, "*batch"]:
    """Negative preference optimisation: gradient ascent that fades as the answer is forgotten.

    Bounded from below, unlike gradient ascent, which it becomes as `beta` goes to 0. The
    reference gets no gradient.

    ::

        -(2 / beta) log sigmoid( beta (n - n_ref) )

    Args:
        nll: `[*batch]`, summed over each answer's tokens: `sequence_nll`.
        reference_nll: `[*batch]`, of the model before unlearning.
        beta: inverse temperature.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: arrays are not floating point.
        ValueError: different shapes, or `beta` is not positive.

    >>> import jax.numpy as jnp
    >>> print(f"{npo(jnp.array(30.0), jnp.array(10.0)):.4f}")
    2.5386

    References:
        Zhang et al., Negative preference optimization, 2024 (arXiv 2404.05868). OpenUnlearning's
        `NPO`: beta 0.1 in its configuration (1 in its class).
    """
    gap = above_reference(nll, reference_nll, "nll", "reference_nll")
    return preference(gap, beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NPO(TwoSided):
    """Negative preference optimisation: ascent that fades as an answer is forgotten.

    Attributes:
        beta: Inverse temperature.
    """

    beta: float = 0.1

    reads = (Need("forget", "nll"), Need("forget", "nll", before=True))

    def forget(self, read: Read) -> Any:
        where = read.where("forget")
        nll, before = (
            sequence_nll(read.nll("forget", before=before), where)[0] for before in (False, True)
        )
        return npo(nll, before, beta=self.beta), None
