"""DPO towards another answer: a refusal (IdkDPO) or one that the model invents (AltPO)."""

import dataclasses
from typing import Any, Literal

import jax
from jaxtyping import Float

from logitjax.models import Decoder
from logitjax.ops import Array, checks
from logitjax.unlearning._instead import invented, refusals
from logitjax.unlearning._losses import above_reference, preference, sequence_nll
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._reads import Need, Read

# The rate of answers that are invented was not tuned.
_PEAKS = {"refusal": 1e-2, "invented": 1e-3}


def dpo(
    chosen_nll: Float[Array, "*batch"],
    rejected_nll: Float[Array, "*batch"],
    reference_chosen_nll: Float[Array, "*batch"],
    reference_rejected_nll: Float[Array, "*batch"],
    *,
    beta: float | int = 0.1,
) -> Float[jax.Array, "*batch"]:
    """Direct preference optimisation; with "I don't know" as the chosen answer it is IdkDPO.

    The references get no gradient.

    ::

        -(2 / beta) log sigmoid( beta ( (n_l - n_l,ref) - (n_w - n_w,ref) ) )

    Args:
        chosen_nll: `[*batch]`, `n_w`: summed over the tokens of the answer to give instead.
        rejected_nll: `[*batch]`, `n_l`: of the answer to forget.
        reference_chosen_nll: `[*batch]`, of the model before unlearning.
        reference_rejected_nll: `[*batch]`, likewise.
        beta: inverse temperature.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: arrays are not floating point.
        ValueError: different shapes, or `beta` is not positive.

    >>> import jax.numpy as jnp
    >>> one = jnp.array(1.0)
    >>> print(f"{dpo(one, one, one, one):.4f}")
    13.8629

    References:
        Rafailov et al., Direct preference optimization, 2023 (arXiv 2305.18290); Maini et al.,
        TOFU, 2024 (arXiv 2401.06121). The factor `2 / beta` is OpenUnlearning's and that of NPO's
        code, which changes the step but not the minimum; others print `1 / beta` or none.
    """
    chosen = above_reference(chosen_nll, reference_chosen_nll, "chosen_nll", "reference_chosen_nll")
    rejected = above_reference(
        rejected_nll, reference_rejected_nll, "rejected_nll", "reference_rejected_nll"
    )
    checks.same_shape(chosen, rejected, "chosen_nll", "rejected_nll")
    return preference(rejected - chosen, beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(TwoSided):
    """Direct preference optimisation towards another answer.

    Attributes:
        beta: Inverse temperature.
        chosen: What is said instead: a `'refusal'`, or five answers that the model has `'invented'`
            (arXiv 2409.13474).
    """

    retain: str = "nll"
    beta: float = 0.1
    chosen: Literal["refusal", "invented"] = "refusal"

    reads = tuple(
        Need(side, "nll", before) for side in ("forget", "instead") for before in (False, True)
    )

    @property
    def peak(self) -> float:
        return _PEAKS[self.chosen]

    def instead(self, model: Decoder, questions: Questions, *, seed: int) -> list[list[str]]:
        if self.chosen == "invented":
            return invented(model, questions, seed=seed)
        return [[text] for text in refusals(len(questions.rows["forget"]), seed=seed)]

    def forget(self, read: Read) -> Any:
        sums = [
            sequence_nll(read.nll(side, before=before), read.where(side))[0]
            for before in (False, True)
            for side in ("instead", "forget")
        ]
        return dpo(*sums, beta=self.beta), None
