"""The arms of the few-shot experiment: every method with its search space, and AMU's ablations."""

import dataclasses
from typing import Any, Literal

from experiments.few_shot.config import Config
from logitjax import few_shot
from logitjax.few_shot import methods

# Settings that the fixed-weight arms, the ablations, have in common.
FIXED_BETA = 2.0
Auxiliary = Literal["second", "zero_shot", "another"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One method.

    Attributes:
        candidate: The head, its training, and the settings from which each sample takes the one
            that is best on its validation pictures.
        auxiliary: The source of the auxiliary features: the `second` encoder, the `zero_shot`
            encoder, or `another` picture, whose features carry no information about this one.
    """

    candidate: few_shot.Candidate
    auxiliary: Auxiliary = "second"


def arms(config: Config) -> dict[str, Arm]:
    """Every arm by its name; `config.grid` is `'small'` or `'full'`."""
    existing = few_shot.Candidate.all(
        config.grid, epochs=config.epochs, batch_size=config.batch_size, steps=config.steps
    )
    # Caches hold no features from before the last projection, and none of single prompts.
    tuned = {
        n: Arm(candidate=one)
        for n, one in existing.items()
        if not {"hidden", "texts"} & {*one.method.needs}
    }
    tuned["amu_same_encoder"] = Arm(candidate=existing["amu"], auxiliary="zero_shot")
    return tuned | _fixed(config)


def _fixed(config: Config) -> dict[str, Arm]:
    """AMU with one weight for all samples and no tuning, and variants that each change one part."""
    recipe = few_shot.Recipe(epochs=config.epochs, batch_size=config.batch_size)

    def fixed(*, auxiliary: Auxiliary = "second", **options: Any) -> Arm:
        amu = methods.AMU(beta=FIXED_BETA, **options)
        one = few_shot.Candidate(method=amu, recipe=recipe)
        return Arm(candidate=one, auxiliary=auxiliary)

    def weighted(**options: Any) -> Arm:
        return fixed(uncertainty=methods.Uncertainty(**options))

    return {
        "fixed": fixed(),
        "fixed_kurtosis": weighted(normalizer="classes"),
        "fixed_kurtosis_250": weighted(normalizer=250.0),
        "fixed_kurtosis_of_logits": weighted(of="logits"),
        "fixed_no_branch_loss": fixed(fusion_share=1.0),
        "fixed_branch_loss_only": fixed(fusion_share=0.0),
        "fixed_random_start": fixed(initial="random"),
        "fixed_same_encoder": fixed(auxiliary="zero_shot"),
        "fixed_another_picture": fixed(auxiliary="another"),
    }
