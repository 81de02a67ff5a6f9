"""Name the classes of new pictures with a head that `logitjax few-shot` made.

    logitjax classify --head=runs/birds/heads/gda --pictures=NEW --out=runs/new

The head says which encoder it learned from; another one, another size or another fit is refused.
OUT/predictions.csv has for each picture its class, the probability, the second class, the classes
that hold the right one with probability `--coverage`, and the place in the order in which labels
would help most: pictures between two classes first. OUT/index.html shows the pictures in this order
with the labelled ones that are nearest.

Pictures may lie anywhere below the folder. Those that cannot be read are named and left out. See
docs/few_shot.md.
"""

import dataclasses

import numpy as np
from etils import epath

from logitjax import few_shot
from logitjax.commands.cli import REQUIRED, field
from logitjax.commands.pictures import Encoders, picture_cards, write_csv, write_page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The head and the pictures."""

    head: str = field(REQUIRED, "Directory of the head.")
    pictures: str = field(REQUIRED, "Folder of the pictures.")
    encoder: str | None = field(None, "Encoder, if it lies elsewhere than when the head learned.")
    auxiliary: str | None = field(None, "Second encoder, likewise.")
    coverage: float = field(0.9, "Share of the sets of classes that are to hold the right one.")
    batch_size: int = field(16, "Number of pictures encoded at once.", minimum=1)

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
    encoders = Encoders(
        specs=tuple(map(str, specs)),
        tokenizer=head.about.get("tokenizer"),
        fit=head.about.get("fit", "crop"),
        batch_size=config.batch_size,
    )
    names = head.class_names
    pictures, files = encoders.encode_folder(
        config.pictures, out, class_weights=head.class_weights, class_names=names, scale=head.scale
    )
    given = head.inputs(pictures)
    probabilities = head.predict_proba(**given)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    sets = [[] for _ in files]
    if head.calibration is not None:
        held = head.predict_sets(**given, coverage=config.coverage)
        sets = [[names[k] for k in order[row] if held[row, k]] for row in range(len(files))]
    ranked = np.take_along_axis(probabilities, order[:, :2], 1)
    doubtful = np.argsort(ranked[:, 0] - ranked[:, 1], kind="stable")
    place = np.empty(len(files), int)
    place[doubtful] = np.arange(1, len(files) + 1)
    rows = [
        {
            "picture": file,
            "class": names[order[row, 0]],
            "probability": f"{ranked[row, 0]:.4f}",
            "second": names[order[row, 1]],
            "second_probability": f"{ranked[row, 1]:.4f}",
            "set": "|".join(sets[row]),
            "label_next": place[row],
        }
        for row, file in enumerate(files)
    ]
    write_csv(out / "predictions.csv", rows)
    cards = picture_cards(head, pictures, files, probabilities, doubtful, labelled=False)
    text = f"{len(files)} pictures, those whose labels would help most first."
    write_page(out / "index.html", "Pictures and their classes", text, cards)
    counts = np.bincount(order[:, 0], minlength=len(names))
    told = ", ".join(f"{count} {name}" for name, count in zip(names, counts.tolist()) if count)
    print(f"{len(files)} pictures: {told}; {out / 'predictions.csv'}, {out / 'index.html'}")
