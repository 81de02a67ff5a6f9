"""Settings of a run of `experiments.graph_fusion`, and its presets."""

import dataclasses
from typing import Any, Literal

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
        student, sources = chosen.pop("who")
        chosen["fit_to"] = (
            *self.reading.fit_to,
            *(both[name] for name in chosen.pop("fit_to", ())),
        )
        chosen |= {"student": both[student], "source": tuple(both[name] for name in sources)}
        return build(Config, flatten(self) | {"part": ()} | chosen)

    @property
    def chooses(self) -> bool:
        """Whether there is a choice to make on validation data."""
        return max(map(len, (self.learning_rate, self.mix, self.gld))) > 1

    @property
    def sources(self) -> tuple[str, ...]:
        """Models to learn from."""
        return self.reading.teachers or (self.student,)


# A model that lacks layers learns faster than a whole one.
_HEALING = (1.25e-4, 3.125e-4, 7.8125e-4)
# The student and teachers of each part, and its differences from the run's configuration.
PARTS: dict[str, dict[str, Any]] = {
    "pair": dict(who=("student", ("other",)), drop_layers=(0,)),
    # InfiGFusion's own claim: several sources, one pivot.
    # All on the rows that both tokenizers cut; otherwise bits a byte would be of different texts.
    "healed_own": dict(
        who=("student", ("student",)),
        fit_to=("other",),
        loss=("sft", "first_piece"),
        learning_rate=_HEALING,
    ),
    "healed_other": dict(
        who=("student", ("other",)), loss=("first_piece",), learning_rate=_HEALING
    ),
    "healed_both": dict(
        who=("student", ("student", "other")), loss=("first_piece",), learning_rate=_HEALING
    ),
    # The second pair of tokenizers: a student with a large vocabulary, a source with a small one.
    "reverse": dict(
        who=("other", ("student",)),
        drop_layers=(0,),
        # One of each kind, because a step takes twice the time of one of the other pair.
        loss=("sft", "first_piece", "hybrid", "alm", "uld"),
        # Most of a small model of 262,144 tokens is its embedding. Few of its rows occur in 5,120
        # tokens, and training it takes half the time of a step.
        freeze="embedding",
        # A first run with the other pair's rates chose 1.26e-5 for SFT.
        learning_rate=(8e-6, 1.26e-5, 2e-5),
        steps=40,
        topic_rows=0,
    ),
}

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        student="tiny",
        drop_layers=(1,),
        source=("tiny:1",),
        data="text:LICENSE",
        loss=ARMS,
        seq_len=64,
        batch_size=2,
        eval_batch=2,
        steps=6,
        eval_rows=4,
        eval_every=3,
        checkpoint_every=3,
        log_every=2,
        cache_top_k=16,
        learning_rate=(1e-2,),
    ),
    "demo": dict(freeze_below=True, steps=40, learning_rate=(3e-4,), eval_rows=24),
    "report": dict(
        freeze_below=True,
        drop_layers=(6, 2, 4, 8),
        drop_arm=("sft", "kl"),
        loss=("sft", "kl", "kl_only", "uld", "uld+gld"),
        gld=(
            "rank/row_sum/closed_form:0.002",
            "token/row_rms/closed_form:0.02",
            "rank/row_sum/sorted_coupling:0.0001",
        ),
        mix=(0.5, 0.75, 0.25),
        learning_rate=(1e-4, 2e-4, 4e-4),
        seeds=3,
        eval_rows=32,
    ),
    # The basis of the claims IF-1 to IF-3. Rows are short so that a step has two, because the null
    # arm takes the graph of the other. A share of 0 is ULD alone, so only the largest is an edge.
    "claims": dict(
        freeze_below=True,
        loss=("uld", "uld+gld", NULL),
        gld=tuple(f"rank/row_sum/closed_form:{share}%" for share in (10, 3, 30, 100, 300)),
        learning_rate=_HEALING,
        trials=8,
        seeds=11,
        seq_len=64,
        batch_size=2,
        checkpoint_every=240,
        eval_rows=96,
        unit_rows=256,
    ),
    # Another tokenizer and vocabulary: `make gemma` fetches the source (Gemma terms of use).
    "heterogeneous": dict(
        source=(".cache/models/gemma-3-270m.gguf",),
        part=("pair", "healed_own", "healed_other", "healed_both", "reverse"),
        freeze_below=True,
        loss=("sft", *CROSS, "uld", "uld+gld"),
        # A first run chose .25, the smallest of .25, .5 and .75.
        mix=(0.25, 0.1, 0.5),
        learning_rate=(2e-5, 5e-5, 1.25e-4),
        trials=6,
        seeds=3,
        eval_rows=48,
        topic_rows=40,
    ),
    # 130k examples, 4K inputs, four 14B-24B models: for a pod. Data: jsonl of prompt and response.
    "paper": dict(
        student="hf:microsoft/phi-4",
        drop_layers=(0,),
        source=(
            "hf:Qwen/Qwen2.5-14B-Instruct",
            "hf:Qwen/Qwen2.5-Coder-14B-Instruct",
            "hf:mistralai/Mistral-Small-24B-Instruct-2501",
        ),
        data="jsonl:data/fusion",
        loss=("sft", "uld+gld"),
        seq_len=4096,
        batch_size=128,
        eval_batch=128,
        accumulate=2,
        steps=1000,
        learning_rate=(1e-5,),
        weight_decay=0.1,
        eval_rows=512,
        eval_every=250,
        checkpoint_every=100,
        dtype="bfloat16",
        layout="stacked",
        remat="full",
        mesh="data:-1,fsdp:32,tensor:2",
    ),
}
