"""Name the classes of pictures by the names of the classes alone, without a labelled picture.

    logitjax zero-shot --encoder=hf:openai/clip-vit-base-patch32 --pictures=PICTURES \\
        --classes='barn owl,kestrel' --prompts='a photo of a {}, a kind of bird.' --out=runs/birds

OUT/predictions.csv and OUT/index.html have the class and its probability. With a few labelled
pictures `logitjax few-shot` does better; see docs/few_shot.md.
"""

import dataclasses

import numpy as np
from etils import epath

from logitjax.commands.cli import REQUIRED, field
from logitjax.commands.pictures import Card, Encoders, write_csv, write_page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The encoder, the pictures and the words."""

    encoder: str = field(REQUIRED, "Encoder with a text tower, by name or path.")
    pictures: str = field(REQUIRED, "Folder of the pictures.")
    classes: tuple[str, ...] = field(REQUIRED, "Name of a class.")
    prompts: tuple[str, ...] = field(("a photo of a {}.",), "Text of a class, {} for its name.")
    tokenizer: str | None = field(None, "Tokenizer of an encoder that brings none.")
    batch_size: int = field(16, "Number of pictures encoded at once.", minimum=1)


def run(config: Config, out: epath.Path) -> None:
    """Encode, predict, write."""
    if len(config.classes) < 2:
        raise ValueError(f"classes: expected two or more, got {config.classes}")
    encoders = Encoders(
        specs=(config.encoder,), tokenizer=config.tokenizer, batch_size=config.batch_size
    )
    weights = np.asarray(encoders.first.zero_shot(config.classes, config.prompts))
    pictures, files = encoders.encode_folder(
        config.pictures,
        out,
        class_weights=weights,
        class_names=config.classes,
        scale=encoders.first.logit_scale,
    )
    logits = np.asarray(pictures.inputs.zero_shot, np.float64)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    probabilities, best = odds / odds.sum(1, keepdims=True), logits.argmax(1)
    rows = [
        {"picture": f, "class": config.classes[k], "probability": f"{probabilities[i, k]:.4f}"}
        for i, (f, k) in enumerate(zip(files, best.tolist()))
    ]
    write_csv(out / "predictions.csv", rows)
    cards = [Card(picture=r["picture"], lines=(r["class"], r["probability"])) for r in rows]
    write_page(out / "index.html", "Pictures and their classes", f"{len(files)} pictures.", cards)
    print(f"{len(files)} pictures: {out / 'predictions.csv'}, {out / 'index.html'}")
