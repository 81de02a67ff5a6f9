"""What a run of `experiments.unlearning` is given, and its presets."""

import dataclasses
from typing import Any

from logitjax import unlearning
from logitjax.commands.cli import field

# Arms that leave the weights, see `arms.differences`.
_DIFFERENCES = ("difference_official", "difference_clean")
# What the presets compare; the other methods are run by name.
_ARMS = (
    *("gradient_ascent", "gradient_difference", "npo", "npo_gradient_difference", "npo_kl"),
    *("simnpo", "rmu", "undial"),
    *_DIFFERENCES,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What one run of the experiment does."""

    model: str = field("smollm2", "Model: a directory, a .gguf file, a known name or tiny.")
    layers: tuple[int, ...] = field((0, 1, 28, 29), "Layers of the model to keep. All if empty.")
    template: str = field("chatml", "Template of the prompts.", choices=("chatml", "llama2", "phi"))
    tofu_dir: str = field("hf:locuslab/TOFU", "TOFU's files: a directory, hf:NAME, or toy.")
    augmentation_dir: str = field(
        "", "Folder of paraphrases and wrong answers. If empty, tofu_dir."
    )
    augment: bool = field(True, "Let assistants also learn paraphrases and wrong answers.")
    paraphrases: int = field(2, "Number of paraphrases of a question.")
    wrong_added: int = field(2, "Number of wrong answers to a question to be silent about.")
    authors: int = field(3, "Number of authors in all, with 20 questions each.")
    forget_authors: int = field(1, "Number of authors to forget.")
    utility: str = field(
        "retain",
        "Utility: TOFU's nine numbers (tofu), or those of the data to keep alone (retain), for a "
        "cut model, which knows nothing of the world.",
        choices=("retain", "tofu"),
    )
    max_length: int = field(96, "Number of tokens of question and answer. The rest is cut off.")
    row_length: int = field(192, "Number of tokens in a row of several questions, in finetuning.")
    finetune_epochs: int = field(15, "Number of epochs of training target and retrained model.")
    finetune_batch: int = field(4, "Number of rows in a step of finetuning.")
    finetune_learning_rate: float = field(1e-3, "Peak learning rate of finetuning.")
    arm: tuple[str, ...] = field(
        _ARMS,
        "Arm to run: a --method of `logitjax unlearn` that trains weights, difference_official or "
        "difference_clean.",
    )
    seeds: int = field(1, "Number of runs of every arm.")
    epochs: int = field(
        3, "Number of epochs over the data to forget, for arms that train the model."
    )
    batch_size: int = field(5, "Number of questions to forget in a step, and to keep.")
    learning_rate: float = field(3e-4, "Peak learning rate of arms that train the model.")
    rates: tuple[float, ...] = field(
        (1.0,), "Multiples of --learning_rate to choose from, on validation with the first seed."
    )
    assistant_layers: int = field(1, "Number of the target's layers in an assistant.")
    rank: int = field(32, "Rank of an assistant's adapters. The official arm has half.")
    betas: tuple[float, ...] = field(
        (6.5,),
        "Weights of silence to choose from, on validation with the first seed.",
    )
    alpha: float = field(0.75, "Weight of the assistant's logits, while the clean arm trains.")
    assistant_epochs: int = field(
        6, "Number of epochs over the data to forget and their paraphrases."
    )
    assistant_learning_rate: float = field(1e-2, "Peak learning rate of assistants.")
    alphas: tuple[float, ...] = field(
        (0.5, 0.6, 0.75, 1.0), "Weights of an assistant to choose from."
    )
    filters: tuple[str, ...] = field(
        ("none", "clean"),
        "Filters of tokens that the clean arm chooses from. Epochs are chosen with the first.",
    )
    retain_items: int = field(10, "Number of questions to keep in the test.")
    validation_items: int = field(10, "Number of questions to keep in validation.")
    validation_wrong: int = field(
        2, "Number of wrong answers to compare a question of validation with."
    )
    world_items: int = field(0, "Number of questions of each real-world set. 0 takes all.")
    wrong_answers: int = field(
        3, "Number of wrong answers to compare a question with. 0 takes all."
    )
    new_tokens: int = field(48, "Number of tokens of a generated answer.")
    eval_batch: int = field(10, "Number of rows that are scored at once.")
    relearn_share: float = field(0.25, "Share of the forgotten questions that is taught again.")
    relearn_steps: int = field(6, "Number of steps of teaching them again. 0 for none.")
    relearn_learning_rate: float = field(1e-4, "Learning rate of teaching them again.")
    models_dir: str = field(".cache/unlearning", "Folder of the models. If empty, the workdir.")
    checkpoint_every: int = field(
        40, "Number of steps between checkpoints of finetuning.", execution=True
    )
    resume_arms: bool = field(False, "Also write checkpoints within an arm, after every epoch.")
    keep_weights: bool = field(False, "Keep the weights of arms that are measured.")
    log_every: int = field(10, "Number of steps between log lines.", execution=True)
    dtype: str = field("float32", "Type that models compute in.", choices=("float32", "bfloat16"))
    mesh: str = field("data:1", "Axes and sizes of the device mesh.", execution=True)

    @property
    def validated(self) -> list[Any]:
        """What validation, and so the choice of an epoch, depends on."""
        return [self.validation_items, self.validation_wrong, self.utility, self.alpha]

    def __post_init__(self) -> None:
        for arm in self.arm:
            if arm not in _DIFFERENCES and unlearning.METHODS.parse(arm).assistant:
                raise ValueError(f"arm: expected {' or '.join(_DIFFERENCES)}, got {arm!r}")
        positive = ("seeds", "epochs", "assistant_epochs", "batch_size", "retain_items")
        for name in (*positive, "validation_items", "validation_wrong"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.row_length < self.max_length:
            raise ValueError(
                f"row_length: a question of max_length={self.max_length} tokens has to fit, got "
                f"{self.row_length}"
            )
        wrong = sorted(set(self.filters) - {"clean", "none"})
        if wrong or not self.filters or not self.alphas:
            raise ValueError(
                f"filters, alphas: expected at least one each, filters clean or none, got "
                f"{list(self.filters)} and {list(self.alphas)}"
            )
        for name in ("rates", "betas"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ValueError(f"{name}: expected positive numbers, got {list(values)}")
        if not 0 < self.relearn_share < 1:
            raise ValueError(f"relearn_share: expected in (0, 1), got {self.relearn_share}")


_WHOLE: dict[str, Any] = dict(
    layers=(),
    utility="tofu",
    assistant_layers=8,
    epochs=10,
    # OpenUnlearning's UNDIAL has ten times the learning rate of its other methods.
    rates=(1.0, 10.0),
    assistant_epochs=10,
    assistant_learning_rate=1e-3,
    batch_size=32,
    retain_items=200,
    validation_items=100,
    validation_wrong=5,
    wrong_answers=0,
    alphas=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    betas=(6.5, 1.0, 20.0),
    new_tokens=200,
    max_length=200,
    row_length=1024,
    eval_batch=64,
    relearn_steps=20,
    resume_arms=True,
    dtype="bfloat16",
    seeds=3,
)

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        model="tiny",
        layers=(),
        template="phi",
        tofu_dir="toy",
        models_dir="",
        authors=3,
        # A method that trains weights, and one that leaves them; `.ci/nightly` runs the others.
        arm=("npo_kl", "difference_clean"),
        max_length=48,
        row_length=96,
        # Until target and retrained model know what they were taught.
        finetune_epochs=200,
        finetune_learning_rate=1e-2,
        epochs=4,
        batch_size=4,
        learning_rate=2e-3,
        assistant_layers=1,
        rank=4,
        assistant_epochs=4,
        assistant_learning_rate=1e-2,
        alphas=(0.25, 0.75),
        retain_items=4,
        validation_items=4,
        validation_wrong=1,
        wrong_answers=2,
        new_tokens=4,
        eval_batch=8,
        relearn_steps=2,
    ),
    "demo": dict(
        arm=("gradient_ascent", "npo_kl", "difference_clean"),
        finetune_epochs=10,
        # What validation chooses in `report`.
        betas=(0.5,),
        alphas=(0.5, 0.75),
        filters=("none",),
    ),
    "report": dict(
        authors=20,
        forget_authors=2,
        finetune_epochs=8,
        seeds=3,
        rates=(0.2, 1.0, 3.0),
        retain_items=20,
        validation_wrong=1,
        betas=(6.5, 2.0, 1.0, 0.5),
    ),
    # TOFU itself: run once for each --forget_authors of 2, 10 and 20 (forget01, 05 and 10).
    "tofu": dict(
        _WHOLE,
        authors=200,
        forget_authors=2,
        finetune_epochs=5,
        finetune_batch=8,
        finetune_learning_rate=1e-4,
        learning_rate=2e-5,
    ),
    "paper": dict(
        _WHOLE,
        model="hf:meta-llama/Llama-2-7b-chat-hf",
        template="llama2",
        authors=200,
        forget_authors=2,
        finetune_epochs=5,
        finetune_batch=8,
        finetune_learning_rate=1e-5,
        learning_rate=1e-5,
        mesh="data:-1,fsdp:8",
    ),
}
