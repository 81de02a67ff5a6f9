"""Settings of a run of `experiments.replication`, and its presets."""

import dataclasses

from experiments.shared import presets
from logitjax.commands.cli import field

KINDS = ("recovered", "copied", "official", "none", "dropped", "scratch")
_ARMS = tuple(f"{kind}_6" for kind in KINDS if kind != "dropped")
_ARMS += ("recovered_4", "copied_4", "none_4", "dropped_4", "scratch_4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run of the experiment."""

    tokenizer: str = field(
        "smollm2", "Model whose tokenizer is used, with its most frequent tokens."
    )
    data: str = field(
        "tfds:wiki_summaries", "Text to train on: text:PATH, jsonl:PATH or tfds:NAME."
    )
    splits: tuple[str, ...] = field(
        ("train[:90%]", "train[90%:95%]", "train[95%:]"),
        "Training, validation and test split of the text.",
    )
    vocab: int = field(8192, "Number of tokens of the small vocabulary.")
    width: int = field(256, "Hidden width of teacher and students.")
    teacher_layers: int = field(6, "Number of layers of the teacher.")
    seq_len: int = field(128, "Number of tokens in a row.")
    batch_size: int = field(16, "Number of rows in a step.")
    teacher_steps: int = field(800, "Number of training steps of the teacher.")
    steps: int = field(500, "Number of training steps of every student.")
    teacher_learning_rate: float = field(2e-3, "Peak learning rate of the teacher.")
    learning_rate: tuple[float, ...] = field(
        (1e-3, 3e-3), "Peak learning rates of the students to choose from."
    )
    temperature: float = field(2.0, "Temperature of the distillation.")
    ce_weight: float = field(0.1, "Weight of the cross-entropy beside the distillation.")
    arm: tuple[str, ...] = field(_ARMS, "Student to train, as KIND_LAYERS.")
    seeds: int = field(1, "Number of runs of every student.")
    prompts: int = field(320, "Number of prompts that the head is recovered from.")
    decimals: int = field(2, "Number of decimals of the reported log-probabilities.")
    timing_repeats: int = field(10, "Number of timed forward passes of each model.")
    checkpoint_every: int = field(200, "Number of steps between checkpoints.", execution=True)
    mesh: str = field("data:-1", "Axes and sizes of the device mesh.", execution=True)
    cache_dir: str | None = field(None, "Folder of the packed text. By default WORKDIR/cache.")

    def __post_init__(self) -> None:
        for arm in self.arm:
            kind, _, layers = arm.rpartition("_")
            if kind not in KINDS or not layers.isdigit() or not int(layers):
                raise ValueError(f"arm: expected KIND_LAYERS of {', '.join(KINDS)}, got {arm!r}")
            if kind == "dropped" and int(layers) > self.teacher_layers:
                raise ValueError(f"arm: {arm} keeps more layers than the teacher has")
        if self.prompts <= self.width + 1:
            raise ValueError(f"prompts: more than width + 1 = {self.width + 1} are needed")


PRESETS = presets.read(__file__)
