"""The arms of unlearning: methods that train weights, and logit differences, which do not."""

import dataclasses
from typing import Any

from experiments.unlearning.config import Config
from logitjax import fusion, models, unlearning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One way to train an assistant and to take its logits away.

    Attributes:
        rank: of the adapters.
        lora_alpha: their scale times their rank.
        retain_weight: beta.
        uniform: where it is silent: `'answers'` or `'all'` positions.
        silent: on which rows: of `'all'` kept authors, or on as many as are forgotten and on wrong
            answers to the forgotten questions, as `'released'`.
        fuse: while a text is scored; keeps what it leaves out.
        generating: while one is generated.
    """

    rank: int
    lora_alpha: float
    retain_weight: float
    uniform: str
    silent: str
    fuse: fusion.LogitDifference
    generating: fusion.LogitDifference

    def method(self, layers: int) -> unlearning.Method:
        """The method that trains its assistant."""
        return unlearning.METHODS.parse(
            f"difference(layers={layers}, relative=False, retain_weight={self.retain_weight}, "
            f"uniform={self.uniform})"
        )


def differences(config: Config) -> dict[str, Difference]:
    """Arms that leave the model's weights alone.

    `official` is the released code: rank 16, beta 5, silence at all positions, the int(0.01 V)
    most likely tokens changed by raw logits with weight 0.8, nothing else generated. `clean` has
    the paper's rank, silence on answers, and centred logits; beta and alpha are chosen, and so is
    whether a filter keeps the logits of tokens under a hundredth of the largest probability. They
    are not excluded while generating: a confident target would have one token left to choose from,
    and forget nothing. It is silent about all kept authors: where it has only seen as many as are
    forgotten, and wrong answers that begin as right ones do, a small assistant is not silent about
    the others.
    """
    official = fusion.LogitDifference(alpha=0.8, form="raw", filter="official", rate=0.01)
    chosen: Any = config.filters[0]
    clean = fusion.LogitDifference(alpha=config.alpha, filter=chosen)
    return {
        "difference_official": Difference(
            rank=config.rank // 2,
            lora_alpha=float(config.rank),
            retain_weight=5.0,
            uniform="all",
            silent="released",
            fuse=official,
            generating=dataclasses.replace(official, outside="exclude"),
        ),
        "difference_clean": Difference(
            rank=config.rank,
            lora_alpha=float(config.rank),
            retain_weight=config.betas[0],
            uniform="answers",
            silent="all",
            fuse=clean,
            generating=clean,
        ),
    }


def with_alpha(difference: Difference, alpha: float, filter: str) -> Difference:
    """The same assistant, taken away with another weight from other tokens."""
    changes: Any = {"alpha": alpha, "filter": filter}
    return dataclasses.replace(
        difference,
        fuse=dataclasses.replace(difference.fuse, **changes),
        generating=dataclasses.replace(difference.generating, **changes),
    )


def deployed(
    model: models.Decoder,
    assistant: unlearning.Assistant | None = None,
    difference: Difference | None = None,
) -> unlearning.Deployed:
    """A model alone, or with an assistant that is taken away as an arm does it."""
    if difference is None:
        return unlearning.Deployed(model=model)
    return unlearning.Deployed(
        model=model,
        assistant=assistant,
        fuse=difference.fuse,
        generating=difference.generating,
    )
