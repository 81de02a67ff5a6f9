"""Find the pictures that match a text or are most similar to a picture.

    logitjax search --encoder=hf:openai/clip-vit-base-patch32 --pictures=PICTURES \\
        --query='a dog on a beach' --out=runs/found

`--query` is a text, or a picture file, which needs no text tower. OUT/found.csv and OUT/index.html
list the pictures by decreasing cosine similarity. The encoded pictures stay in OUT, so that another
query there takes seconds. See docs/few_shot.md.
"""

import dataclasses

import numpy as np
from etils import epath

from logitjax import data
from logitjax.commands import pictures
from logitjax.commands.cli import REQUIRED, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(pictures.Folder):
    """The encoder, the pictures and the query."""

    encoder: str = field(REQUIRED, "Encoder, by name or path.")
    query: str = field(REQUIRED, "Text, or path of a picture.")


def run(config: Config, out: epath.Path) -> None:
    """Encode and compare the pictures, and write the results."""
    encoders = pictures.Encoders([config.encoder], config)
    first, file = encoders.first, epath.Path(config.query)
    if file.is_file():
        pixels = np.asarray(data.read_picture(file))
        query = first.features(data.ImageViews.of(first, "plain")(pixels, row=0))
    else:
        query = first.text_features(first.tokenize([config.query]))
    # The query takes the place of a class's weights; the second column is not read.
    weights, names = np.stack([np.asarray(query)[0]] * 2, 1), (config.query, "")
    seen, files = encoders.encode_folder(
        config.pictures, out, class_weights=weights, class_names=names, scale=1.0
    )
    cosines = seen.inputs.zero_shot[:, 0]
    order = np.argsort(-cosines, kind="stable").tolist()
    rows = [{"picture": files[row], "cosine": f"{cosines[row]:.4f}"} for row in order]
    pictures.write_csv(out / "found.csv", rows)
    cards = [(row["picture"], (row["cosine"],), ()) for row in rows]
    pictures.write_page(out / "index.html", config.query, f"The nearest of {len(files)}.", cards)
    print(f"{rows[0]['picture']} first of {len(files)}; {out / 'found.csv'}, {out / 'index.html'}")
