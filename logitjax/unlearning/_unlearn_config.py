"""Settings for unlearning your own rows, and limits on the damage."""

import dataclasses
import math

from logitjax.storage import option
from logitjax.unlearning._method import Method
from logitjax.unlearning._selection import Limits
from logitjax.unlearning.methods._difference import Difference

_DEFAULT = Difference()


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearnConfig:
    """A method, its training, and limits on the damage.

    Attributes:
        method: The method with its options: one of `METHODS`, or any other `Method`.
        adapters: Train adapters. Otherwise train all weights of the model, which takes four copies.
        lora_rank: Rank of the adapters.
        steps: Maximum number of optimiser steps.
        check_every: Number of steps between evaluations of rows to forget and to keep.
        batch_size: Number of rows to forget in a step, with four times as many to keep.
        rounds: Maximum number of training rounds. After each round, phrasings that still extract
            something are added to the training, until two searches find none.
        budget: Number of combinations of phrasings that each search tries.
        learning_rate: Peak learning rate. 0 takes the method's: 5e-3 for an assistant, 1e-3 to 3e-2
            for other adapters, and 3e-4 for all weights.
        least_probability: Minimum share of its mean probability that each kind of answer to keep
            (neighbours, paraphrases and others) must retain.
        least_row: Minimum share of its probability that every single known answer must retain.
        least_rouge: Minimum share of ROUGE-L F1 that generated answers to keep must retain.
        least_fluency: Minimum share of the entropy of word pairs and triples in generated answers.
        most_perplexity: Maximum factor by which the perplexity of other text may rise.
        thorough: Also run attacks that train or sample.
        samples: Number of answers sampled for each question by a thorough attack, up to 100.
        seed: Seed of batches and adapters.
    """

    method: Method = _DEFAULT
    adapters: bool = True
    lora_rank: int = 16
    steps: int = 150
    check_every: int = 25
    batch_size: int = 4
    rounds: int = 2
    budget: int = 6
    learning_rate: float = 0.0
    # A run's folder is judged again with other limits, and nothing is trained again.
    least_probability: float = option(0.97, execution=True)
    least_row: float = option(0.9, execution=True)
    least_rouge: float = option(0.97, execution=True)
    least_fluency: float = option(0.95, execution=True)
    most_perplexity: float = option(1.02, execution=True)
    thorough: bool = False
    samples: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(f"method: expected an unlearning.Method, got {self.method!r}")
        counts = ("lora_rank", "steps", "check_every", "batch_size", "rounds", "samples")
        shares = ("least_probability", "least_row", "least_rouge", "least_fluency")
        checks = [(name, getattr(self, name) >= 1, "at least 1") for name in counts]
        checks += [(name, 0 <= getattr(self, name) <= 1, "a share of 0 to 1") for name in shares]
        checks += [
            ("samples", self.samples <= 100, "at most 100"),
            ("budget", self.budget >= 0, "at least 0"),
            ("learning_rate", 0 <= self.learning_rate < math.inf, "0 or a positive number"),
            ("most_perplexity", 1 <= self.most_perplexity < math.inf, "a factor of at least 1"),
        ]
        for name, holds, words in checks:
            if not holds:
                raise ValueError(f"{name}: expected {words}, got {getattr(self, name)}")

    @property
    def limits(self) -> Limits:
        """The limits, by measure."""
        return Limits(
            probability=self.least_probability,
            row=self.least_row,
            rouge=self.least_rouge,
            fluency=self.least_fluency,
            perplexity=self.most_perplexity,
        )

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        if self.learning_rate:
            return self.learning_rate
        # Whole weights take far less than the adapters that a method was tuned with.
        return self.method.peak if self.adapters else 3e-4
