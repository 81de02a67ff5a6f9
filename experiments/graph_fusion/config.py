"""What a run of `experiments.graph_fusion` is given, and its presets."""

import dataclasses
from typing import Any, Literal

from logitjax.commands.cli import field
from logitjax.distillation import objectives

LOSSES = objectives.LOSSES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What one run of the experiment does."""

    pivot: str = field("smollm2", "Model to train: a directory, a .gguf file or a known name.")
    pivot_layers: tuple[int, ...] = field((), "Layers of the pivot to keep; all if none")
    source: tuple[str, ...] = field(("smollm2",), "Model to learn from")
    source_weight: tuple[float, ...] = field((), "Weight of each source; equal if none")
    teacher: tuple[str, ...] = field(
        (), "cache:DIR for each source in turn, as `logitjax cache-logits` writes it"
    )
    data: str = field(
        "tfds:wiki_summaries", "Text to train on: tfds:NAME, text:PATH or jsonl:PATH."
    )
    on_error: Literal["raise", "skip"] = field(
        "raise", "What a malformed row does.", choices=("raise", "skip")
    )
    loss: tuple[str, ...] = field(("sft", "kl", "uld", "uld+gld"), "Arm to train")
    mix: float = field(0.5, "Weight of the distillation terms; SFT gets the rest.")
    gld: tuple[str, ...] = field(
        ("rank/row_sum/closed_form:0.002",),
        "Graph loss beside ULD, as NODE/FEATURE/VALUE:WEIGHT; the best of several is kept",
    )
    top_k: int = field(10, "Logits of each position that ULD and GLD look at.")
    cache_top_k: int = field(64, "Logits of each position that a cache keeps; KL uses them all.")
    seq_len: int = field(256, "Tokens of a row.")
    batch_size: int = field(4, "Rows of a step, over all processes.")
    accumulate: int = field(1, "Micro-batches of a step.")
    steps: int = field(100, "Optimiser steps of each arm.")
    learning_rate: tuple[float, ...] = field((3e-4,), "Peak learning rate; an arm takes its best")
    warmup: float = field(0.1, "Share of the steps in which the learning rate rises.")
    weight_decay: float = field(0.01, "Weight decay of AdamW.")
    seeds: int = field(1, "Runs of each arm at its best settings.")
    eval_rows: int = field(32, "Rows of validation and of test that are scored.")
    eval_every: int = field(25, "Steps between validations.")
    checkpoint_every: int = field(25, "Steps between checkpoints.")
    log_every: int = field(5, "Steps between log lines.")
    dtype: str = field("float32", "Type that models compute in.", choices=("float32", "bfloat16"))
    mesh: str = field("data:-1,fsdp:1,tensor:1", "Axes and sizes of the device mesh.")
    layout: str = field(
        "listed",
        "Whether layers are stacked and scanned, or listed and unrolled.",
        choices=("stacked", "listed"),
    )
    remat: str = field(
        "none", "What the backward pass computes again.", choices=("none", "dots", "full")
    )
    profile_steps: int = field(0, "Steps of each arm to profile, from the third on.")
    tensorboard: bool = field(False, "Write TensorBoard event files too.")
    prompt: str = field("The history of", "Start of the sample continuations.")


# A fifth of SmolLM2's layers, its first and last, in batches that two cores can train.
_STUDENT: dict[str, Any] = dict(pivot_layers=(0, 1, 2, 3, 28, 29), batch_size=2)

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        pivot="tiny",
        source=("tiny:1",),
        data="text:LICENSE",
        loss=LOSSES,
        seq_len=64,
        batch_size=2,
        steps=6,
        eval_rows=4,
        eval_every=3,
        checkpoint_every=3,
        log_every=2,
        cache_top_k=16,
        learning_rate=(1e-2,),
    ),
    "demo": dict(
        **_STUDENT,
        steps=60,
        learning_rate=(1e-3,),
        eval_rows=24,
        eval_every=20,
        checkpoint_every=30,
    ),
    "report": dict(
        **_STUDENT,
        steps=80,
        loss=LOSSES,
        gld=(
            "rank/row_sum/closed_form:0.002",
            "token/row_rms/closed_form:0.02",
            "rank/row_sum/sorted_coupling:0.0001",
        ),
        learning_rate=(5e-4, 1e-3, 2e-3),
        seeds=3,
        eval_rows=48,
        eval_every=40,
        checkpoint_every=40,
    ),
    # Another tokenizer and vocabulary: `make gemma` fetches the source (Gemma terms of use).
    "heterogeneous": dict(
        source=(".cache/models/gemma-3-270m.gguf",),
        loss=("sft", "uld+gld"),
        **_STUDENT,
        steps=40,
        learning_rate=(1e-3,),
        seeds=3,
        eval_rows=32,
        eval_every=20,
        checkpoint_every=20,
    ),
    # 130k examples, 4K inputs, four 14B-24B models: for a pod. Data: jsonl of prompt and response.
    "paper": dict(
        pivot="hf:microsoft/phi-4",
        source=(
            "hf:Qwen/Qwen2.5-14B-Instruct",
            "hf:Qwen/Qwen2.5-Coder-14B-Instruct",
            "hf:mistralai/Mistral-Small-24B-Instruct-2501",
        ),
        data="jsonl:data/fusion",
        loss=("sft", "uld+gld"),
        seq_len=4096,
        batch_size=128,
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
