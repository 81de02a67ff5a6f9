"""Settings of a run of `experiments.forgetting`, and its presets."""

import dataclasses

from experiments.forgetting.divergence import Divergence
from experiments.shared import presets
from logitjax import unlearning
from logitjax.commands.cli import field

_METHODS = (
    *("difference", "gradient_difference", "npo_gradient_difference", "simnpo"),
    *("idk_dpo", "rmu", "undial", "satimp"),
)
# For a method that trains all weights instead of adapters.
ALL = "+all"


def method_of(name: str) -> unlearning.Method:
    """The method with a name."""
    if name == "divergence":
        return Divergence()
    return unlearning.METHODS.parse(name.removesuffix(ALL))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run: the facts taught and forgotten, the methods, and the attacks."""

    model: str = field("smollm2", "Model: a directory, a .gguf file, a known name or tiny.")
    scene: str = field(
        "facts",
        "Rows to teach and forget: invented facts beside known ones, or authors of TOFU.",
        choices=("facts", "tofu"),
    )
    tofu_dir: str = field("hf:locuslab/TOFU", "TOFU's files: a directory or hf:NAME.")
    authors: int = field(40, "Number of authors to teach, with 20 questions each.")
    forget_authors: int = field(4, "Number of authors to forget.")
    facts_seed: int = field(0, "Seed of the invented facts.")
    teach_steps: int = field(25, "Number of steps of teaching.")
    teach_batch: int = field(12, "Number of rows in a step of teaching.")
    teach_rate: float = field(1e-3, "Peak learning rate of teaching.")
    teach_rank: int = field(16, "Rank of the adapters that learn the rows and are then merged.")
    retrained: int = field(0, "Number of models to teach all rows but those to forget.")
    method: tuple[str, ...] = field(
        _METHODS,
        "Method to compare, or divergence (two small models). NAME+all trains all weights.",
        execution=True,
    )
    rates: tuple[float, ...] = field(
        (1.0,),
        "Multiples of each method's learning rate in `logitjax unlearn` to choose from, with the "
        "first seed.",
    )
    seeds: int = field(1, "Number of runs of every method.")
    steps: int = field(40, "Largest number of optimiser steps.")
    check_every: int = field(10, "Number of steps between measurements.")
    batch_size: int = field(8, "Number of rows to forget in a step, and of rows to keep.")
    layers: int = field(0, "Number of layers of an assistant. 0 for a quarter of the model's.")
    lora_rank: int = field(16, "Rank of all adapters.")
    least: float = field(
        0.98, "Smallest share of probability, ROUGE-L and fluency that rows to keep must retain."
    )
    most_perplexity: float = field(
        1.02, "Largest factor by which the perplexity of other text may grow."
    )
    text: str = field("tfds:wiki_summaries", "Other text, whose perplexity has to stay.")
    text_windows: int = field(8, "Number of pieces of other text to score.")
    text_length: int = field(128, "Number of tokens in each piece of other text.")
    topics: int = field(0, "Number of articles of other text to name the topic of. 0 for none.")
    max_length: int = field(256, "Largest number of tokens of a row.")
    new_tokens: int = field(48, "Largest number of tokens of a generated answer.")
    eval_batch: int = field(4, "Number of rows that are scored at once.")
    thorough: bool = field(True, "Also run attacks that sample, on the first seed.")
    relearn_rates: tuple[float, ...] = field(
        (1e-4, 5e-4, 2e-3), "Learning rates of relearning; seeds after the first use its worst."
    )
    relearn_steps: tuple[int, ...] = field(
        (6, 30), "Numbers of relearning steps after which the model is tested."
    )
    relearn_seeds: int = field(1, "Number of runs of teaching again.")
    only: tuple[str, ...] = field(
        (), "Part to make, such as target or npo. By default all.", execution=True
    )
    dtype: str = field("float32", "Type that models compute in.", choices=("float32", "bfloat16"))
    mesh: str = field("data:1", "Axes and sizes of the mesh that trains.", execution=True)

    def __post_init__(self) -> None:
        for name in self.method:
            method_of(name)
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates: expected positive numbers, got {list(self.rates)}")
        known = {"target", "control", "retrained", *self.method}
        if wrong := [one for one in self.only if not {one, one.rpartition("-")[0]} & known]:
            raise ValueError(f"only: expected some of {sorted(known)}, got {wrong[0]!r}")
        if self.seeds < 1:
            raise ValueError(f"seeds: expected at least 1, got {self.seeds}")

    def learning_rates(self, method: str) -> list[float]:
        """Those that are tried with the first seed, in order."""
        default = self.of(method, 0.0, 0).peak
        return sorted(float(f"{rate * default:.6g}") for rate in self.rates)

    def of(self, method: str, rate: float, seed: int) -> unlearning.UnlearnConfig:
        """The settings of a trial: the same steps, rows, rank and limits for all methods."""
        value = method_of(method)
        if method == "difference":
            value = dataclasses.replace(value, layers=self.layers)
        return unlearning.UnlearnConfig(
            method=value,
            adapters=not method.endswith(ALL),
            learning_rate=rate,
            seed=seed,
            lora_rank=self.lora_rank,
            steps=self.steps,
            check_every=self.check_every,
            batch_size=self.batch_size,
            # One training each: a method tested in more ways would otherwise train longer.
            rounds=1,
            budget=0,
            least_probability=self.least,
            least_row=min(self.least, 0.9),
            least_rouge=self.least,
            least_fluency=self.least,
            most_perplexity=self.most_perplexity,
        )


PRESETS = presets.read(__file__)
