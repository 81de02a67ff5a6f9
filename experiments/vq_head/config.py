"""Settings of a run of `experiments.vq_head`, and its presets."""

import dataclasses

from experiments.shared import presets
from logitjax.commands.cli import field

# Each head's name in tables; screens are named by the head that screens.
NAMES = {
    "full": "full head, float32",
    "bf16": "bfloat16 rows",
    "int8_plain": "8-bit rows",
    "int8": "8-bit rows, tuned biases",
    "int4": "4-bit rows, tuned biases",
    "packed": "packed product codes",
    "certified": "8-bit rows, certified, exact rows",
    "paged": "pages of rows, shared by 16 positions",
    "paged alone": "pages of rows, of one position",
    "vq_paper": "VQ as published: k-means over rows, no bias",
    "vq_plain": "VQ, weighted k-means, no bias",
    "vq_bias": "VQ + bias, weighted k-means",
    "flash": "FlashHead, rebuilt",
    "svd": "SVD-softmax, rebuilt",
    "faiss": "FAISS IndexPQFastScan, exact rows",
    "adaptive": "adaptive softmax, tuned on labels",
}
# Maps of the heads without bias that nothing pretrained knows of.
MAPS = {
    "random_map": "VQ without bias, random mapping",
    "frequency_map": "VQ without bias, tokens of like frequency",
    "neighbour_map": "VQ without bias, tokens with like neighbours",
}
SCRATCH_NAMES = {
    "full_bias": "full softmax + bias (control)",
    "full": "full softmax",
    "vq_bias": "VQ + bias, mapping from pretrained rows *",
    "vq_random": "VQ + bias, random mapping",
    "vq_plain": "VQ without bias, mapping from pretrained rows *",
    "adaptive": "adaptive softmax",
} | MAPS
#: Arms of the comparison of heads; the others are those of VQ-Logits' claims.
HEADS = (
    *("bf16", "int8_plain", "int8", "int4", "screened", "certified", "paged"),
    *("vq_bias", "flash", "svd", "faiss"),
)
ARMS = (*HEADS, "vq_paper", "vq_plain", "adaptive")
SCRATCH_ARMS = tuple(name for name in SCRATCH_NAMES if name not in MAPS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run of the experiment."""

    model: str = field("smollm2", "Model: a directory, a .gguf file, a known name or tiny.")
    data: str = field("tfds:wiki_summaries", "Text to fit on: text:PATH, jsonl:PATH or tfds:NAME.")
    test_data: str = field("", "Text of another kind to report on too.")
    splits: tuple[str, ...] = field(
        ("train", "validation", "test"), "Splits of a tfds data set to fit, choose and report on."
    )
    cache_dir: str | None = field(None, "Folder of the hidden states. By default WORKDIR/cache.")
    seq_len: int = field(256, "Number of tokens in a row.")
    batch_rows: int = field(8, "Number of rows that the model reads at once.")
    train_tokens: int = field(96_000, "Number of positions to fit and tune on.")
    validation_tokens: int = field(6_000, "Number of positions for choosing learning rates.")
    test_tokens: int = field(14_000, "Number of positions to report on.")
    arm: tuple[str, ...] = field(ARMS, "Head to convert to.", execution=True, choices=ARMS)
    codes: tuple[int, ...] = field((2048,), "Sizes of the codebook.")
    code_arm: tuple[str, ...] = field(
        (), "Head to convert to with all codebooks but the first. By default all VQ heads."
    )
    seeds: int = field(1, "Number of runs of each arm at its best learning rate.")
    learning_rate: tuple[float, ...] = field((2e-3,), "Peak learning rates to choose from.")
    steps: int = field(100, "Number of tuning steps of each arm.")
    batch_size: int = field(1024, "Number of positions in a step.")
    kmeans_iterations: int = field(8, "Number of iterations of k-means.")
    candidates: tuple[int, ...] = field((512,), "Numbers of tokens that exact rows re-score.")
    stretches: bool = field(False, "Report each seed on a stretch of its own.")
    adaptive_div: float = field(4.0, "Factor by which the tails of adaptive softmax narrow.")
    scratch_arm: tuple[str, ...] = field(
        (), "Head to train a small model from scratch with.", choices=tuple(SCRATCH_NAMES)
    )
    scratch_vocab: int = field(8192, "Vocabulary of the small model.")
    scratch_codes: int = field(0, "Number of codes of small models. 0 for V / 16.")
    scratch_width: int = field(128, "Hidden size of the small model.")
    scratch_steps: int = field(200, "Number of training steps of the small model.")
    scratch_batch: int = field(8, "Number of rows in a step of the small model.")
    scratch_learning_rate: tuple[float, ...] = field(
        (3e-3,), "Peak learning rates of the small model to choose from."
    )
    timing_repeats: int = field(20, "Number of timed decoding steps.")
    mesh: str = field("data:-1", "Axes and sizes of the device mesh.", execution=True)

    def __post_init__(self) -> None:
        if len(self.splits) != 3:
            raise ValueError(f"--splits: expected three, got {len(self.splits)}")


PRESETS = presets.read(__file__)
