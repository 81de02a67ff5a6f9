"""Find the pictures that fit a text best, or are most like a picture.

    logitjax search --encoder=hf:openai/clip-vit-base-patch32 --pictures=PICTURES \\
        --query='a dog on a beach' --out=runs/found

`--query` is a text, or the file of a picture, for which the encoder needs no text tower.
OUT/found.csv and OUT/index.html have the pictures by falling cosine. The encoded pictures stay in
OUT, so that another query there takes seconds. See docs/few_shot.md.
"""

import dataclasses

import numpy as np
from etils import epath

from logitjax import data
from logitjax.commands.cli import REQUIRED, field
from logitjax.commands.pictures import Card, Encoders, write_csv, write_page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The encoder, the pictures and the words."""

    encoder: str = field(REQUIRED, "Encoder with a text tower, by name or path.")
    pictures: str = field(REQUIRED, "Folder of the pictures.")
    query: str = field(REQUIRED, "A text, or the file of a picture.")
    count: int = field(50, "Number of pictures that are listed.", minimum=1)
    tokenizer: str | None = field(None, "Tokenizer of an encoder that brings none.")
    batch_size: int = field(16, "Number of pictures encoded at once.", minimum=1)


def run(config: Config, out: epath.Path) -> None:
    """Encode, compare, write."""
    encoders = Encoders(
        specs=(config.encoder,), tokenizer=config.tokenizer, batch_size=config.batch_size
    )
    first, file = encoders.first, epath.Path(config.query)
    if file.is_file():
        pixels = np.asarray(data.read_picture(file))
        query = first.features(data.ImageViews.of(first, "plain")(pixels, row=0))
    else:
        query = first.text_features(first.tokenize([config.query]))
    # What is looked for stands where classes have their weights; the second column is not read.
    weights = np.stack([np.asarray(query)[0]] * 2, 1)
    pictures, files = encoders.encode_folder(config.pictures, out, class_weights=weights, scale=1.0)
    cosines = pictures.inputs.zero_shot[:, 0]
    rows = [
        {"picture": files[row], "cosine": f"{cosines[row]:.4f}"}
        for row in np.argsort(-cosines, kind="stable")[: config.count].tolist()
    ]
    write_csv(out / "found.csv", rows)
    cards = [Card(picture=row["picture"], lines=(row["cosine"],)) for row in rows]
    write_page(out / "index.html", config.query, f"The nearest of {len(files)} pictures.", cards)
    print(f"{rows[0]['picture']} first of {len(files)}; {out / 'found.csv'}, {out / 'index.html'}")
