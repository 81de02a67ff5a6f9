"""Classify new pictures with a head from `logitjax few-shot`.

    logitjax classify --head=runs/birds/heads/gda --pictures=NEW --out=runs/new

The head records its encoder; a different encoder, size or fit is rejected. Towers trained by
`logitjax few-shot --towers=...` are saved with the head and used. For each picture,
OUT/predictions.csv has the class, its probability, the second class, a set of classes with the
right one with probability `--coverage`, and the rank in the order in which labels would help most.
OUT/index.html shows the pictures in this order next to the most similar labelled ones. Pictures may
be anywhere below the folder; unreadable ones are listed and skipped. See docs/few_shot.md.
"""

import dataclasses

from etils import epath

from logitjax import few_shot
from logitjax.commands import pictures
from logitjax.commands.cli import REQUIRED, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(pictures.Folder):
    """The head and the pictures."""

    head: str = field(REQUIRED, "Directory of the head.")
    encoder: str | None = field(None, "Encoder, if it has been moved since the head was trained.")
    auxiliary: str | None = field(None, "Second encoder, if it has been moved.")
    coverage: float = field(0.9, "Probability that a set of classes contains the right one.")

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage: expected a number between 0 and 1, got {self.coverage}")


def run(config: Config, out: epath.Path) -> None:
    """Encode the pictures, predict their classes, and write the results."""
    head, tuned = few_shot.load(config.head), epath.Path(config.head) / "encoder"
    specs = [str(tuned) if tuned.exists() else config.encoder or head.about.get("encoder")]
    if "auxiliary" in head.method.needs:
        specs.append(config.auxiliary or head.about.get("auxiliary"))
    if None in specs:
        raise ValueError(
            f"encoder: expected an encoder, because {config.head} was trained on files, got none"
        )
    fit = head.about.get("fit", "crop")
    encoders = pictures.Encoders(list(map(str, specs)), config, base=config.encoder, fit=fit)
    classifier = {"class_weights": head.class_weights, "class_names": head.class_names}
    new, files = encoders.encode_folder(config.pictures, out, scale=head.scale, **classifier)
    pictures.write_answers(head, new, files, out, config.coverage)
