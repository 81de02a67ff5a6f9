"""What a run of `experiments.few_shot` is given, and its presets."""

import dataclasses
from typing import Any

from experiments.few_shot import arms as few_shot_arms
from experiments.few_shot import data as few_shot_data
from logitjax import few_shot
from logitjax.commands.cli import field

ARMS = few_shot_arms.ARM_NAMES
# What they learn replaces a part of the zero-shot logits.
_SCALED = (few_shot.ClipAdapterConfig, few_shot.TaskResConfig, few_shot.CrossModalConfig)
_MAIN = few_shot_arms.METHODS + few_shot_arms.ABLATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What one run of the experiment does."""

    data: tuple[str, ...] = field(
        ("stamps", "fashion"), "Data set, NAME=SPEC where it lies elsewhere, or synthetic:CLASSES"
    )
    encoder: str = field("efficientnet_lite0", "Encoder with names for classes: name or path.")
    auxiliary: str = field("alexnet", "The other encoder: name or path.")
    features: str = field("runs/features/few_shot", "Where features are kept, for all runs.")
    views: str = field("plain", "Views of pictures to learn from: plain or random:COUNT.")
    encode_batch: int = field(32, "Pictures encoded at once.")
    shots: tuple[int, ...] = field((1, 2, 4, 8, 16), "Pictures of a class.")
    runs: int = field(10, "Samples of every number of shots.")
    at_once: int = field(1, "Samples trained together; more pays on accelerators, if it fits.")
    arm: tuple[str, ...] = field(_MAIN, "Arm to train")
    grid: str = field("small", "How much arms search.", choices=("small", "full"))
    epochs: int = field(50, "Of AMU.")
    batch_size: int = field(8, "Of AMU.")
    steps: int = field(60, "Of 32 pictures, of arms without a published recipe.")
    seed: int = field(0, "Of samples and orders.")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.arm) - set(ARMS))
        if unknown:
            raise ValueError(f"arm: expected one of {', '.join(ARMS)}, got {unknown[0]!r}")
        for name in ("runs", "at_once", "epochs", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"shots: expected positive numbers, got {self.shots}")


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        data=("synthetic:5",),
        shots=(1, 4),
        runs=3,
        epochs=4,
        steps=8,
        arm=("amu", "tip_adapter", "task_res", "fixed"),
    ),
    "demo": {},
    "report": dict(arm=ARMS, grid="full", steps=200),
    "paper": dict(
        data=tuple(few_shot_data.CLIP_SOURCES),
        encoder="hf:timm/resnet50_clip.openai",
        auxiliary="r-50-1000ep.pth.tar",
        views="random:10",
        encode_batch=128,
        runs=3,
        grid="full",
        steps=12_800,
    ),
}
