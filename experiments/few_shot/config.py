"""Settings of a run of `experiments.few_shot`, and its presets."""

import dataclasses
from typing import Literal

from experiments.shared import presets
from logitjax.commands.cli import field

METHODS: tuple[str, ...] = (
    *("amu", "amu_kurtosis", "amu_paper", "amu_same_encoder"),
    *("tip_adapter", "tip_adapter_f", "gda", "pro_ker", "rehark"),
    *("task_res", "lp_plus_plus", "clap", "zs_lp"),
    *("linear_probe", "linear_probe_auxiliary"),
)
ABLATIONS = ("fixed", "fixed_kurtosis", "fixed_no_branch_loss", "fixed_random_start")
MEASURES: tuple[str, ...] = (
    *("fixed_same_encoder", "fixed_branch_loss_only", "fixed_kurtosis_of_logits"),
    *("fixed_kurtosis_250", "fixed_another_picture"),
)
ARMS = METHODS + ABLATIONS + MEASURES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run of the experiment."""

    data: tuple[str, ...] = field(
        ("stamps", "fashion"),
        "Data set by name, NAME=SPEC if its pictures lie elsewhere, or synthetic:CLASSES.",
        execution=True,
    )
    encoder: str = field(
        "efficientnet_lite0", "Encoder of the zero-shot classifier: a name or a path."
    )
    auxiliary: str = field("alexnet", "Second encoder, for the bias: a name or a path.")
    features: str = field("runs/features/few_shot", "Folder of encoded pictures, which runs share.")
    views: str = field("plain", "Views of the pictures to learn from: plain or random:COUNT.")
    encode_batch: int = field(32, "Number of pictures that are encoded at once.")
    shots: tuple[int, ...] = field((1, 2, 4, 8, 16), "Number of labelled pictures of each class.")
    runs: int = field(10, "Number of samples for each number of shots.", minimum=1)
    test_parts: int = field(
        0, "Number of parts of fixed test pictures that are also scored separately."
    )
    at_once: int = field(1, "Number of samples that a device trains at once.", minimum=1)
    arm: tuple[str, ...] = field(METHODS + ABLATIONS, "Arm to train.", execution=True, choices=ARMS)
    grid: Literal["small", "full"] = field("small", "Whether an arm tries 4 settings or 12.")
    epochs: int = field(50, "Number of epochs of AMU.", minimum=1)
    batch_size: int = field(8, "Number of pictures in a step of AMU.", minimum=1)
    steps: int = field(
        60, "Number of steps of 32 pictures, for arms without a published recipe.", minimum=1
    )
    seed: int = field(0, "Seed of samples and of the order of pictures.")
    mesh: str = field(
        "data:-1", "Axes and sizes of the device mesh; `data` splits the samples.", execution=True
    )

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"shots: expected positive numbers, got {self.shots}")


PRESETS = presets.read(__file__)
