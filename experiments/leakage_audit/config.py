"""Settings of a run of `experiments.leakage_audit`, and its presets."""

import dataclasses

from experiments.shared import presets
from logitjax import leakage
from logitjax.commands.cli import field

_DEMO = (
    *("full", "round_2", "round_1", "round_0", "noise_0.3", "noise_1", "floor_-10"),
    *("top_1000", "top_20", "top_5", "top_5_bias", "sampling", "draws", "argmax"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run of the experiment."""

    model: str = field("smollm2", "Model: tiny, smollm2, hf:REPO, gguf:PATH or a directory.")
    data: str = field("tfds:wiki_summaries", "Text to cut prompts from.")
    prompts: int = field(700, "Number of prompts, with one row of logits each.")
    prompt_length: int = field(24, "Number of tokens in a prompt.")
    batch_size: int = field(25, "Number of prompts in a forward pass.")
    policy: tuple[str, ...] = field(_DEMO, "Policy of the API to audit.")
    seeds: int = field(1, "Number of seeds of noise. Other policies run once.")
    corner: int = field(
        0, "Number of rows and columns of the corner to query through a bias. 0 for none."
    )

    def __post_init__(self) -> None:
        for name in self.policy:
            leakage.LogitPolicy.parse(name)
        for name in ("prompts", "prompt_length", "batch_size", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.corner > self.prompts:
            raise ValueError(f"corner: at most prompts={self.prompts}, got {self.corner}")


PRESETS = presets.read(__file__)
