"""Settings of a run of `experiments.graph_fusion`, and its presets."""

import dataclasses
from typing import Literal

from experiments.shared import presets
from logitjax import distillation, training
from logitjax.commands.cli import build, field, flatten, nested

# KL alone is a comparison for SFT + KL.
ARMS: tuple[str, ...] = ("sft", "kl", "uld", "gld", "uld+gld", "kl_only")
# Losses for a source with another tokenizer (docs/any_tokenizer.md).
CROSS: tuple[str, ...] = ("first_piece", "pkl", "hybrid", "hkl", "alm")
# ULD beside graphs of other rows, which are unrelated to this one: the null of `uld+gld`.
NULL = "uld+gld_other"
# Settings that the arms or the models determine.
_NOT_READ = (
    "terms", "teacher_reads", "tail_samples", "api_key", "batch_size", "dtype", "layout"
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run of the experiment."""

    student: str = field("smollm2", "Model to prune and to heal.")
    drop_layers: tuple[int, ...] = field(
        (6,), "Number of layers to prune. With several, settings are chosen at the first."
    )
    pruning: distillation.Pruning = nested(
        without=("drop_layers", "keep_layers", "kv_heads", "mlp_channels")
    )
    freeze_below: bool = field(False, "Freeze the embedding and the layers below the cut.")
    freeze: str | None = field(
        None, "Regular expression of other parameters to freeze, such as embedding."
    )
    reading: distillation.Reading = nested(
        distillation.Reading(data="tfds:wiki_summaries", seq_len=128),
        without=_NOT_READ,
        rename={"teachers": "source", "top_k": "cache_top_k"},
    )
    loss: tuple[str, ...] = field(("sft", "kl", "uld", "uld+gld"), "Arm to train.", execution=True)
    drop_arm: tuple[str, ...] = field(
        (), "Arm to train at all numbers of layers but the first. By default all arms."
    )
    mix: tuple[float, ...] = field(
        (0.5,), "Weight of the distillation terms beside SFT. The best of several is kept."
    )
    gld: tuple[str, ...] = field(
        ("rank/row_sum/closed_form:0.002",),
        "Graph loss beside ULD, as NODE/FEATURE/VALUE:WEIGHT. The best of several is kept. With "
        "N% its gradient at the last hidden states is N % of that of SFT, before training.",
    )
    top_k: int = field(10, "Number of top logits of each position that ULD and GLD compare.")
    learning_rate: tuple[float, ...] = field(
        (2e-4,), "Peak learning rate. The best of several is kept for each arm."
    )
    course: distillation.Course = nested(
        distillation.Course(
            steps=60, batch_size=1, eval_batch=8, loop=training.LoopOptions(checkpoint_every=50)
        ),
        without=("learning_rate", "seed", "progress"),
    )
    trials: int = field(9, "Number of runs in which each arm chooses its settings.")
    seeds: int = field(1, "Number of runs of each arm at its best settings.", execution=True)
    dtype: Literal["float32", "bfloat16"] = field("float32", "Type that models compute in.")
    mesh: str = field(
        "data:-1,fsdp:1,tensor:1", "Axes and sizes of the device mesh.", execution=True
    )
    layout: Literal["stacked", "listed"] = field(
        "listed", "Whether layers are stacked and scanned, or listed and unrolled."
    )
    remat: Literal["none", "dots", "full"] = field(
        "none", "Recomputation in the backward pass, to save memory.", execution=True
    )
    unit_rows: int = field(
        0,
        "Number of test rows that are scored one by one, in place of eval_rows together. The seed "
        "that chooses is not reported then.",
    )
    topic_rows: int = field(
        0, "Number of test articles whose topic the student has to name. The data need topics."
    )
    part: tuple[str, ...] = field(
        (),
        "Part of a report of student and source: pair, healed_own, healed_other, healed_both or "
        "reverse. By default the configuration is one run.",
        execution=True,
    )

    def __post_init__(self) -> None:
        if self.freeze_below and self.layout != "listed":
            raise ValueError("freeze_below: expected listed layers, stacked ones train together")
        existing = (*ARMS, *CROSS, NULL)
        for arm in (*self.loss, *self.drop_arm):
            if arm not in existing:
                raise ValueError(f"loss: expected some of {', '.join(existing)}, got {arm!r}")
        if unknown := set(self.part) - set(PARTS):
            raise ValueError(
                f"part: expected some of {', '.join(PARTS)}, got {sorted(unknown)[0]!r}"
            )
        if self.part and len(self.reading.teachers) != 1:
            raise ValueError(
                f"source: expected one other model with parts, got {len(self.reading.teachers)}"
            )
        grid = len(self.learning_rate) + len(self.mix) + len(self.gld) - 2
        if self.chooses and self.trials < grid:
            raise ValueError(f"trials: expected at least the {grid} of the grid, got {self.trials}")

    def of_part(self, name: str) -> "Config":
        """The configuration of one part."""
        both = {"student": self.student, "other": self.reading.teachers[0]}
        chosen = dict(PARTS[name])
        chosen["fit_to"] = (
            *self.reading.fit_to,
            *(both[name] for name in chosen.pop("fit_to", ())),
        )
        chosen["student"] = both[chosen["student"]]
        chosen["source"] = tuple(both[name] for name in chosen["source"])
        return build(Config, flatten(self) | {"part": ()} | chosen)

    @property
    def chooses(self) -> bool:
        """Whether there is a choice to make on validation data."""
        return max(map(len, (self.learning_rate, self.mix, self.gld))) > 1

    @property
    def sources(self) -> tuple[str, ...]:
        """Models to learn from."""
        return self.reading.teachers or (self.student,)


# The student and teachers of each part, and its differences from the run's configuration.
PARTS = presets.read(__file__, "parts.toml")
PRESETS = presets.read(__file__)
