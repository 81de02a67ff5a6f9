"""Settings of a run of `experiments.dynamic_fusion`, and its presets."""

import dataclasses

from experiments.shared import presets
from logitjax.commands.cli import field

# SmolLM2-135M's most valuable layers: leaving any of them out costs the most NLL.
_LAYERS = (0, 1, 2, 8, 10, 11, 21, 23, 24, 27, 28, 29)
_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run of the experiment."""

    large: str = field("smollm2", "Large model: a directory, a .gguf file, a known name or tiny.")
    base: str = field("", "Small base model. If empty, it is cut from the large one and healed.")
    small_layers: tuple[int, ...] = field(
        _LAYERS, "Layers of the large model that the small base keeps."
    )
    general: str = field("tfds:wiki_summaries", "Text to heal on, and to score as general text.")
    domain: str = field(
        "tfds:experiments.dynamic_fusion.first_folio:FirstFolio", "Text of the first domain."
    )
    task: str = field("topics:tfds:wiki_summaries", "Second domain: topics:SOURCE or letters.")
    models_dir: str = field(".cache/dynamic_fusion", "Folder of the models, which runs share.")
    seq_len: int = field(128, "Number of tokens in a row.")
    batch_size: int = field(4, "Number of rows in a step.")
    heal_steps: int = field(60, "Number of training steps of healing.")
    heal_learning_rate: float = field(5e-4, "Peak learning rate of healing.")
    tune_steps: int = field(24, "Number of training steps on the first domain.")
    task_length: int = field(48, "Number of tokens in a question.")
    task_examples: int = field(4000, "Number of questions to train on.")
    task_batch: int = field(8, "Number of questions in a step.")
    task_steps: int = field(32, "Number of training steps on the second domain.")
    learning_rate: float = field(5e-4, "Peak learning rate of an expert.")
    large_learning_rate: float = field(2e-4, "Peak learning rate of the ceiling.")
    train_embeddings: bool = field(False, "Train embeddings and head as well as the layers.")
    validation_tokens: int = field(512, "Number of tokens for choosing the static alpha.")
    test_tokens: int = field(1024, "Number of tokens of each text to report on.")
    validation_questions: int = field(96, "Number of questions for choosing the static alpha.")
    test_questions: int = field(192, "Number of questions to report on.")
    graded: str = field(
        "", "Task of lm-evaluation-harness to answer as well, such as gsm8k. Empty for none."
    )
    graded_questions: int = field(1000, "Number of its questions to answer.")
    static_alpha: tuple[float, ...] = field(_ALPHAS, "Static alphas to choose from.")
    examples: int = field(0, "Number of answered questions before each question of a claim.")
    part: tuple[str, ...] = field(
        (),
        "Data set to score unit by unit, for the claims: domain, task, general, shown (questions "
        "after examples), both_domain or both_task. By default the run is the comparison.",
        execution=True,
    )
    seeds: int = field(1, "Number of seeds, each with experts and a ceiling of its own.")
    block_size: int = field(64, "Number of positions whose logits are in memory at once.")
    trace_tokens: int = field(96, "Number of positions in the plot of alpha.")
    decode_tokens: int = field(32, "Number of tokens to generate for measuring speeds. 0 for none.")
    prompt: str = field("Enter the King", "Beginning of the generated text.")
    checkpoint_every: int = field(20, "Number of steps between checkpoints.", execution=True)
    log_every: int = field(8, "Number of steps between log lines.", execution=True)
    dtype: str = field("float32", "Type that models compute in.", choices=("float32", "bfloat16"))
    layout: str = field(
        "listed",
        "Whether layers are scanned (stacked) or unrolled (listed) in training.",
        choices=("stacked", "listed"),
    )
    mesh: str = field("data:-1", "Axes and sizes of the device mesh.", execution=True)

    def __post_init__(self) -> None:
        for name in ("seeds", "heal_steps", "tune_steps", "task_steps", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.static_alpha:
            raise ValueError("static_alpha: expected at least one")


PRESETS = presets.read(__file__)
