"""DPO towards another answer: a refusal (IdkDPO) or one that the model invents (AltPO)."""

import dataclasses
from typing import Any, Literal

import jax
from jaxtyping import Float

from logitjax.models import Decoder
from logitjax.ops import Array, checks
from logitjax.unlearning._instead import invented, refusals
from logitjax.unlearning._losses import above_reference, preference
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._reads import Need, Read

# The rate for invented answers was not tuned.
_PEAKS = {"refusal": 1e-2, "invented": 1e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(TwoSided):
    """Direct preference optimisation towards another answer.

    The loss is `-(2 / beta) log sigmoid(beta ((n_l - n_l,ref) - (n_w - n_w,ref)))`, with `n` summed
    over the tokens of the answer to forget (`l`) and of the other (`w`).

    Attributes:
        beta: Inverse temperature.
        chosen: Answers to give instead: a `'refusal'`, or five that the model has `'invented'`
            (arXiv 2409.13474).

    References:
        Rafailov et al., Direct preference optimization, 2023 (arXiv 2305.18290); Maini et al.,
        TOFU, 2024 (arXiv 2401.06121). The factor `2 / beta` is OpenUnlearning's; others print
        `1 / beta` or none.
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

    def values(
        self,
        chosen_nll: Float[Array, "*batch"],
        rejected_nll: Float[Array, "*batch"],
        reference_chosen_nll: Float[Array, "*batch"],
        reference_rejected_nll: Float[Array, "*batch"],
    ) -> Float[jax.Array, "*batch"]:
        """Losses of pairs with these summed negative log-likelihoods, now and before.

        >>> one = jax.numpy.array(1.0)
        >>> print(f"{DPO().values(one, one, one, one):.4f}")
        13.8629
        """
        chosen = above_reference(chosen_nll, reference_chosen_nll, "chosen_nll")
        rejected = above_reference(rejected_nll, reference_rejected_nll, "rejected_nll")
        checks.shapes(chosen_nll=(chosen, "any *same"), rejected_nll=(rejected, "any *same"))
        return preference(rejected - chosen, self.beta)

    def forget(self, read: Read) -> Any:
        sums = [
            read.answer_nll(side, before=before)
            for before in (False, True)
            for side in ("instead", "forget")
        ]
        # `[rows]`: a value an answer, not a token.
        return self.values(*sums), None
