"""What a run of `experiments.vq_head` is given, and its presets."""

import dataclasses
from typing import Any

from experiments.vq_head import arms
from experiments.vq_head import scratch as vq_head_scratch
from logitjax.commands.cli import field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What one run of the experiment does."""

    model: str = field("smollm2", "A directory, a .gguf file or a known name; tiny for a toy.")
    data: str = field("tfds:wiki_summaries", "text:PATH, jsonl:PATH or tfds:NAME.")
    splits: tuple[str, ...] = field(
        ("train", "validation", "test"), "What to fit, choose and report on, of a tfds dataset"
    )
    cache_dir: str | None = field(None, "Hidden states for several runs; default WORKDIR/cache.")
    seq_len: int = field(256, "Tokens a row.")
    batch_rows: int = field(8, "Rows at a time through the model.")
    train_tokens: int = field(96_000, "Positions to fit and tune on.")
    validation_tokens: int = field(6_000, "Positions to choose learning rates on.")
    test_tokens: int = field(14_000, "Positions to report on.")
    arm: tuple[str, ...] = field(arms.ARMS, "Head to convert to")
    codes: tuple[int, ...] = field((2048,), "Sizes of the codebook.")
    seeds: int = field(1, "Runs of each arm at its best learning rate.")
    learning_rate: tuple[float, ...] = field((2e-3,), "Peak; several are tried.")
    steps: int = field(100, "Optimiser steps of each arm.")
    batch_size: int = field(1024, "Positions a step.")
    reassign_every: int = field(25, "Steps between reassignments of vq_likelihood.")
    kmeans_iterations: int = field(8, "Lloyd iterations.")
    pages: tuple[int, ...] = field((64, 128, 256), "Lengths of shortlists, in pages.")
    page_size: int = field(8, "Tokens a page.")
    shortlist_steps: int = field(0, "Steps of a shortlist's own loss after conversion.")
    shortlist_batch: int = field(256, "Positions of each.")
    product_groups: int = field(96, "Groups of product quantisation.")
    product_codes: int = field(256, "Codes a group.")
    packed_groups: int = field(192, "Groups of 16 codes, of product quantisation packed in bytes.")
    screen_rank: int = field(48, "Rank of the low-rank head that screens.")
    candidates: tuple[int, ...] = field((512,), "Tokens that exact rows re-score.")
    adaptive_div: float = field(4.0, "By how much the tails of adaptive softmax narrow.")
    scratch_arm: tuple[str, ...] = field((), "Head to train a small model from scratch with")
    scratch_vocab: int = field(8192, "Vocabulary of that model.")
    scratch_width: int = field(128, "Hidden size of that model.")
    scratch_steps: int = field(200, "Steps of it.")
    scratch_batch: int = field(8, "Rows a step of it.")
    scratch_learning_rate: tuple[float, ...] = field((3e-3,), "Its peak rate; several are tried.")
    scratch_reassign_batches: int = field(40, "Batches that a reassignment looks at.")
    timing_repeats: int = field(20, "Timed decoding steps.")
    mesh: str = field("data:-1", "Axes and sizes of the device mesh.")

    def __post_init__(self) -> None:
        if len(self.splits) != 3:
            raise ValueError(f"--splits: expected three, got {len(self.splits)}")
        for name, known in (("arm", arms.ARMS), ("scratch_arm", vq_head_scratch.ARMS)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ValueError(f"--{name}: expected one of {', '.join(known)}, got {unknown[0]}")


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        model="tiny",
        data="text:LICENSE",
        seq_len=64,
        train_tokens=600,
        validation_tokens=100,
        test_tokens=200,
        codes=(32,),
        steps=6,
        batch_size=64,
        reassign_every=3,
        kmeans_iterations=3,
        pages=(4,),
        page_size=4,
        shortlist_steps=2,
        shortlist_batch=32,
        product_groups=4,
        product_codes=16,
        packed_groups=8,
        screen_rank=4,
        candidates=(8,),
        scratch_arm=("full_bias", "vq_reassigned", "adaptive"),
        scratch_vocab=128,
        scratch_width=16,
        scratch_steps=6,
        scratch_batch=8,
        scratch_reassign_batches=2,
        timing_repeats=2,
    ),
    "demo": dict(
        train_tokens=24_000,
        validation_tokens=2_000,
        test_tokens=6_000,
        arm=("vq_paper", "vq_bias", "vq_likelihood", "packed_product"),
        codes=(1024, 2048),
        candidates=(128, 512),
        steps=60,
        reassign_every=20,
        kmeans_iterations=5,
    ),
    "report": dict(
        arm=tuple(arm for arm in arms.ARMS if arm != "full_labels"),
        codes=(2048, 512),
        seeds=3,
        learning_rate=(1e-3, 3e-3),
        steps=60,
        batch_size=512,
        reassign_every=20,
        kmeans_iterations=5,
        shortlist_steps=20,
        scratch_arm=vq_head_scratch.ARMS,
        scratch_steps=150,
        scratch_learning_rate=(2e-3, 6e-3),
    ),
    "paper": dict(
        # C4: --data=tfds:c4:en --splits='train[:200000]' --splits='validation[:50%]'
        # --splits='validation[50%:]', it has no test split.
        data="tfds:wikitext103",
        train_tokens=1_000_000,
        validation_tokens=100_000,
        test_tokens=240_000,
        seq_len=1024,
        codes=(512, 2048, 4096, 8192),
        seeds=3,
        learning_rate=(1e-3, 2e-3, 4e-3, 8e-3),
        steps=2000,
        batch_size=8192,
        reassign_every=400,
        kmeans_iterations=20,
        shortlist_steps=500,
        shortlist_batch=4096,
        scratch_arm=vq_head_scratch.ARMS,
        scratch_vocab=49_152,
        scratch_width=576,
        scratch_steps=20_000,
        scratch_batch=64,
        scratch_learning_rate=(3e-4, 1e-3, 3e-3),
    ),
}
