"""Settings of a run of `experiments.dual_head`, and its presets."""

import dataclasses

from experiments.shared import presets
from logitjax.commands.cli import field

_MAIN = ("ce", "kd", "dkd", "single", "dual_linear", "dual_linear_aligned")
_MAIN += ("dual_mlp", "dual_mlp_aligned")
ARMS = (
    *(*_MAIN, "kd_t1", "kd_t2", "dkd_warm", "kd_standardized", "dist"),
    *("logit_only", "kd_and_logit"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run of the experiment."""

    data: str = field(
        "tfds:udhr", "Data set: tfds:NAME, cifar100:DIR, folder:DIR or synthetic:CLASSES."
    )
    image_size: int = field(32, "Height and width of images from a folder.")
    train_examples: int = field(0, "Number of training examples. 0 takes all.")
    validation_examples: int = field(
        2000, "Number of examples held out of training, if the data have no validation split."
    )
    test_examples: int = field(0, "Number of test examples. 0 takes all.")
    augment: str = field(
        "none", "How images are augmented.", choices=("none", "crop_flip", "resized_crop")
    )
    teacher: str = field("mlp-512-256", "Network of the teacher.")
    teacher_examples: int = field(
        0, "Number of training examples of the teacher. 0 uses the students' number."
    )
    teacher_weights: str | None = field(
        None, "Torch checkpoint of the teacher. By default the teacher is trained."
    )
    student: str = field("mlp-128", "Network of the student.")
    arm: tuple[str, ...] = field(_MAIN, "Arm to train.", execution=True, choices=ARMS)
    alpha: tuple[float, ...] = field((0.01, 0.1, 1.0), "Weight of the distillation loss to try.")
    rate: tuple[float, ...] = field(
        (1.0,), "Multiple of the learning rate to try with every alpha."
    )
    convex: bool = field(
        False, "Divide both losses by 1 + alpha, so that a large alpha is not a large step."
    )
    seeds: int = field(
        1,
        "Number of runs of an arm. The first chooses alpha and rate, and is reported if alone.",
        minimum=1,
    )
    epochs: int = field(20, "Number of epochs of the students.", minimum=1)
    teacher_epochs: int = field(20, "Number of epochs of the teacher.", minimum=1)
    batch_size: int = field(64, "Number of examples in a step, summed over devices.", minimum=1)
    learning_rate: float = field(
        0.05, "Learning rate of the students, divided by ten at each decay_at."
    )
    teacher_learning_rate: float = field(
        0.05, "Learning rate of the teacher, which falls likewise."
    )
    decay_at: tuple[float, ...] = field(
        (0.625, 0.75, 0.875), "Share of the epochs at which the learning rate falls."
    )
    momentum: float = field(0.9, "Momentum of SGD.")
    weight_decay: float = field(5e-4, "Weight decay of all parameters, norms included.")
    warmup_epochs: int = field(
        1,
        "Number of epochs over which alpha grows in arms that warm up. DKD has 20 of 240.",
        minimum=1,
    )
    stop_epoch: int = field(0, "Epoch from which alpha is 0. 0 for never.")
    temperature: float = field(4.0, "Temperature of kd, dkd and dist.")
    diagnose_every: int = field(
        2, "Number of epochs between measures of neural collapse, for the first seed.", minimum=1
    )
    checkpoint_every: int = field(
        10, "Number of epochs between checkpoints.", execution=True, minimum=1
    )
    mesh: str = field("data:-1", "Axes and sizes of the device mesh.", execution=True)

    def __post_init__(self) -> None:
        for name in ("alpha", "rate"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one value")


PRESETS = presets.read(__file__)
