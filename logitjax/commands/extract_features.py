"""Compute features of frozen image encoders once, to train heads on them without the encoders.

    logitjax extract-features --encoder=efficientnet_lite0 --encoder=alexnet \\
        --data=folder:PICTURES --size=160 --out=runs/features

For every encoder, split and kind of view it writes features, class logits where the encoder has
them, and labels to OUT/ENCODER/SPLIT_VIEWS, as array_record files that `few_shot.FeatureCache`
reads and verifies. `--views=random:10` makes ten random crops of each picture, randomly mirrored,
identical for every encoder and in every run.

You may stop the run at any time; the same command continues it. Several processes share the work.
Two encoders took 15 s for 435 pictures of 160 pixels on two CPU cores; docs/vision.md has tables.
"""

import dataclasses
import re
import time
from typing import Literal

import jax
from absl import logging
from etils import epath

from logitjax import data, few_shot, processes, vision
from logitjax.commands.cli import REQUIRED, field
from logitjax.commands.tables import markdown_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The pictures, their views and the encoders; a folder can be extended by more of each."""

    encoder: tuple[str, ...] = field(
        REQUIRED, "Encoder, by name, file, directory or hf:org/name.", execution=True
    )
    data: str = field(
        REQUIRED, "Pictures: folder:DIR, tfds:NAME, stamps, emoji:VENDOR, recognition:NAME."
    )
    split: tuple[str, ...] = field(
        ("all",), "Split, which may be sliced: test[:2000].", execution=True
    )
    views: tuple[str, ...] = field(
        ("plain",), "Views of every picture: plain or random:COUNT.", execution=True
    )
    fit: Literal["crop", "pad"] = field("crop", "How to make pictures square: crop or pad.")
    size: int = field(0, "Height and width of the views in pixels. 0 takes the encoder's own.")
    rows: str = field(
        "all", "Pictures to encode: all, a number counted from the start, or per_class:N."
    )
    seed: int = field(0, "Seed of random views and of the choice of pictures per class.")
    batch_size: int = field(
        16, "Number of pictures encoded at once, with all their views.", minimum=1
    )
    compute_dtype: Literal["float32", "bfloat16"] = field("float32", "Compute type.")
    dtype: Literal["float16", "float32"] = field("float16", "Type of the numbers on disk.")


def run(config: Config, out: epath.Path) -> None:
    """Read, encode, write; then print a table of the contents."""
    table = []
    for spec in config.encoder:
        encoder = vision.load_encoder(
            spec, size=config.size or None, dtype=jax.numpy.dtype(config.compute_dtype)
        )
        for split in config.split:
            images = data.load_image_set(config.data, split=split)
            rows = images.choose(config.rows, seed=config.seed)
            kinds = {
                kind: data.ImageViews.of(encoder, kind, fit=config.fit, seed=config.seed)
                for kind in config.views
            }
            for kind, views in kinds.items():
                directory = out / slug(spec) / f"{slug(split)}_{slug(kind)}"
                start = time.perf_counter()
                cache = few_shot.extract_features(
                    encoder,
                    images,
                    directory,
                    views=views,
                    rows=rows,
                    batch_size=config.batch_size,
                    dtype=config.dtype,
                )
                # Sizes on disk are known once every process has written its shards.
                processes.barrier(f"features {directory.name}")
                seconds = time.perf_counter() - start
                logging.info("%s: %d rows in %.1f s", directory, len(rows), seconds)
                size = sum(path.stat().length for path in directory.glob("*.array_record"))
                row = {"cache": f"{slug(spec)}/{directory.name}", "pictures": len(rows)}
                row |= {"views": views.count, "features": encoder.num_features}
                row |= {"logits": encoder.num_classes, "MB": size / 1e6, "seconds": seconds}
                table.append(row)
                # Its files stay open, and a run may create many.
                del cache
    if jax.process_index() == 0:
        text = markdown_table(table)
        (out / "report.md").write_text(text + "\n")
        print(text)


def slug(text: str) -> str:
    """Part of a folder's name, different for each slice of a split."""
    # `test[:10]` and `test[10:]` must not share a folder.
    spelt = text.replace(":", "_to_") if "[" in text else text
    spelt = spelt.replace("%", "pct").replace("[-", "[minus").replace("_to_-", "_to_minus")
    return re.sub(r"\W+", "_", spelt).strip("_")
