"""Name the classes of new pictures with a head that `logitjax few-shot` made.

    logitjax classify --head=runs/birds/heads/gda --pictures=NEW --out=runs/new

The head says which encoder it learned from; another one, another size or another fit is refused.
OUT/predictions.csv has for each picture its class, the probability, the second class, a set of
classes that holds the right one with probability `--coverage`, and its place in the order in which
labels would help most. OUT/index.html shows the pictures in this order with the labelled ones that
are nearest. Pictures may lie anywhere below the folder; those that cannot be read are named and
left out. See docs/few_shot.md.
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
    encoder: str | None = field(None, "Encoder, if it lies elsewhere than when the head learned.")
    auxiliary: str | None = field(None, "Second encoder, likewise.")
    coverage: float = field(0.9, "Share of the sets of classes that are to hold the right one.")

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage: expected a number between 0 and 1, got {self.coverage}")


def run(config: Config, out: epath.Path) -> None:
    """Encode, predict, write."""
    head = few_shot.load(config.head)
    specs = [config.encoder or head.about.get("encoder")]
    if "auxiliary" in head.method.needs:
        specs.append(config.auxiliary or head.about.get("auxiliary"))
    if None in specs:
        raise ValueError(f"encoder: expected one, as {config.head} learned from files, got none")
    encoders = pictures.Encoders(
        list(map(str, specs)), fit=head.about.get("fit", "crop"), batch_size=config.batch_size
    )
    classifier = {"class_weights": head.class_weights, "class_names": head.class_names}
    new, files = encoders.encode_folder(config.pictures, out, scale=head.scale, **classifier)
    pictures.write_answers(head, new, files, out, config.coverage)
