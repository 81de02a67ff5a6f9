"""How one's own rows are unlearned, and what has to be left."""

import dataclasses

from logitjax.unlearning._objective import UNLEARNING_METHODS
from logitjax.unlearning._selection import Limits

# Peak learning rates of adapters, the middle of a grid of which the best was not at an edge (the
# report of `experiments.forgetting`). Losses that fade as an answer is forgotten need more.
_PEAKS = {
    "difference": 5e-3,
    "idk_dpo": 1e-2,
    "rmu": 3e-3,
    "satimp": 1e-2,
    "simnpo": 1e-2,
    "undial": 3e-2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearnConfig:
    """A method, its training, and the limits of what may be lost.

    Attributes:
      method: `'difference'`, which trains an assistant, or one of `UNLEARNING_METHODS`, which
        trains adapters of the model.
      layers: Number of the model's first layers in an assistant.
      relative: The assistant's logits are what its adapters add to its layers' logits. Without,
        they are all of the adapted layers' logits, as in the paper.
      adapters: Train adapters. Without, train all weights of the model, which takes four copies.
      lora_rank: Rank of the adapters.
      steps: Largest number of optimiser steps.
      check_every: Number of steps between measurements of what is forgotten and kept.
      batch_size: Number of rows to forget in a step, and of rows to keep.
      learning_rate: Peak learning rate. 0 takes the method's: 5e-3 for an assistant, 1e-3 to 3e-2
        for other adapters, and 3e-4 for all weights.
      retain_weight: Weight of the loss on rows to keep; the method's if None, 1 for an assistant.
      least_probability: Least share of their mean probability that answers to keep may have left.
      least_rouge: Least share of ROUGE-L F1 that answers generated for them may have left.
      least_fluency: Least share of the entropy of word pairs and triples in these.
      most_perplexity: Largest factor by which the perplexity of other text may rise.
      thorough: Also run attacks that train, sample or take gradients.
      seed: Seed of batches and adapters.
    """

    method: str = "difference"
    layers: int = 8
    relative: bool = True
    adapters: bool = True
    lora_rank: int = 16
    steps: int = 40
    check_every: int = 10
    batch_size: int = 8
    learning_rate: float = 0.0
    retain_weight: float | None = None
    least_probability: float = 0.98
    least_rouge: float = 0.98
    least_fluency: float = 0.98
    most_perplexity: float = 1.02
    thorough: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        known = ("difference", *UNLEARNING_METHODS)
        if self.method not in known:
            raise ValueError(f"method: expected one of {', '.join(known)}, got {self.method!r}")
        if self.method == "difference" and not self.adapters:
            raise ValueError("adapters: expected True for an assistant, which is made of them")
        for name in ("layers", "lora_rank", "steps", "check_every", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def limits(self) -> Limits:
        """The limits, by what is measured."""
        return Limits(
            probability=self.least_probability,
            rouge=self.least_rouge,
            fluency=self.least_fluency,
            perplexity=self.most_perplexity,
        )

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        if self.learning_rate:
            return self.learning_rate
        return _PEAKS.get(self.method, 1e-3) if self.adapters else 3e-4

    @property
    def sign(self) -> float:
        """Sign of the strength: adapters of a task vector are subtracted."""
        return 1.0 if self.method == "difference" else UNLEARNING_METHODS[self.method].strength

    @property
    def most(self) -> float:
        """Largest strength that is tried: alpha of an assistant, the factor of other adapters."""
        # Little is left to learn of what is known: a task vector goes further than it was learnt.
        return 1.0 if self.method != "difference" and self.sign > 0 else 4.0
