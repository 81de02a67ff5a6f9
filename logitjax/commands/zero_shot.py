"""Classify pictures by the names of the classes, without labelled pictures.

    logitjax zero-shot --encoder=hf:openai/clip-vit-base-patch32 --pictures=PICTURES \\
        --classes='barn owl,kestrel' --prompts='a photo of a {}, a kind of bird.' --out=runs/birds

Writes the same files as `logitjax classify`, without sets and examples. With a few labelled
pictures `logitjax few-shot` is more accurate; see docs/few_shot.md.
"""

import dataclasses

import numpy as np
from etils import epath

from logitjax import few_shot
from logitjax.commands import pictures
from logitjax.commands.cli import REQUIRED, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(pictures.Folder):
    """The encoder, the pictures and the classes."""

    encoder: str = field(REQUIRED, "Encoder with a text tower, by name or path.")
    classes: tuple[str, ...] = field(REQUIRED, "Names of the classes, separated by commas.")
    prompts: tuple[str, ...] = field(("a photo of a {}.",), "Prompt with {} for a class's name.")

    @property
    def names(self) -> list[str]:
        """The names of the classes as a list."""
        return [name.strip() for each in self.classes for name in each.split(",")]

    def __post_init__(self) -> None:
        if len(self.names) < 2 or not all(self.names):
            raise ValueError(f"classes: expected at least two names, got {', '.join(self.names)!r}")


def run(config: Config, out: epath.Path) -> None:
    """Encode the pictures, predict their classes, and write the results."""
    encoders = pictures.Encoders([config.encoder], config)
    weights = np.asarray(encoders.first.zero_shot(config.names, config.prompts))
    scale = encoders.first.logit_scale
    new, files = encoders.encode_folder(
        config.pictures, out, class_weights=weights, class_names=config.names, scale=scale
    )
    # The bias has weight 0, and one picture is too few to calibrate on.
    nothing = few_shot.Candidate(method=few_shot.methods.TipAdapter(beta=0.0))
    head = few_shot.fit(nothing, new[:1])
    pictures.write_answers(head, new, files, out, 0.9)
