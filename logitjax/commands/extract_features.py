"""Let frozen encoders look at pictures once, so that heads can be trained without them.

    python -m logitjax.commands.extract_features --preset=stamps --workdir=runs/features

writes, for every encoder, split and kind of view, features (and the class head's logits) with the
labels into WORKDIR/ENCODER/SPLIT_VIEWS, array_record files that `logitjax.few_shot.FeatureCache`
reads and checks. ``--views=random:10`` are ten views a picture, cut out and mirrored at random but
the same for every encoder and in every run. Kill it whenever you like: the same command goes on
with the shard it was at. Several processes share the shards, and each encodes with its own devices.
435 stamps at 160 pixels by both encoders of the preset took 15 s on two CPU cores; docs/vision.md
has the tables.
"""

import dataclasses
import re
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from experiments.shared.report import markdown_table
from logitjax import data, processes, vision
from logitjax.commands import cli, features
from logitjax.commands.cli import field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to encode, with what."""

    encoder: tuple[str, ...] = field(("efficientnet_lite0",), "Encoder: a name or a path")
    data: str = field(
        "stamps", "stamps, mnist_5k, emoji:VENDOR, tfds:NAME, folder:DIR, recognition:NAME, ..."
    )
    split: tuple[str, ...] = field(("all",), "Split, perhaps sliced (test[:2000])")
    views: tuple[str, ...] = field(("plain",), "Views of every picture: plain or random:COUNT")
    fit: str = field("crop", "What a square loses or gains.", choices=("crop", "pad"))
    size: int = field(0, "Height and width of the views; 0 takes the encoder's own.")
    rows: str = field("all", "Pictures: all, a number from the start, or per_class:N.")
    seed: int = field(0, "Of random views and of the choice per class.")
    batch_size: int = field(16, "Pictures a process encodes at once, with all their views.")
    compute_dtype: str = field("float32", "Compute type.", choices=("float32", "bfloat16"))
    dtype: str = field("float16", "Type on disk.", choices=("float16", "float32"))


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        encoder=("random:resnet8",),
        data="synthetic:4",
        split=("test",),
        views=("plain", "random:2"),
        rows="per_class:3",
        size=16,
        batch_size=4,
    ),
    "stamps": dict(encoder=("efficientnet_lite0", "alexnet"), fit="pad", size=160),
    "fashion": dict(
        encoder=("efficientnet_lite0", "alexnet"),
        data="tfds:fashion_mnist_png",
        split=("train[:500]", "test[:2000]"),
        size=96,
        batch_size=32,
    ),
    "paper": dict(
        encoder=("hf:timm/resnet50_clip.openai",),
        data="recognition:imagenet",
        split=("train",),
        views=("random:10",),
        rows="per_class:16",
        batch_size=128,
        compute_dtype="bfloat16",
    ),
}


def rows_of(images: data.ImageSet, spec: str, *, seed: int = 0) -> np.ndarray:
    """``all``, the first so many, or ``per_class:N`` drawn anew for every seed; ascending."""
    if spec == "all":
        return np.arange(len(images))
    kind, _, number = spec.rpartition(":")
    if kind not in ("", "per_class") or not number.isdigit() or int(number) < 1:
        raise ValueError(f"rows: expected all, a number or per_class:N, got {spec!r}")
    if not kind:
        return np.arange(min(int(number), len(images)))
    order = np.random.default_rng(seed).permutation(len(images))
    labels = images.labels[order]
    classes = range(len(images.class_names))
    return np.sort(np.concatenate([order[labels == c][: int(number)] for c in classes]))


def run(config: Config, workdir: epath.Path) -> None:
    """Read, encode, write; then a table of what there is."""
    table = []
    for spec in config.encoder:
        encoder = vision.load_encoder(
            spec, size=config.size or None, dtype=jax.numpy.dtype(config.compute_dtype)
        )
        for split in config.split:
            images = data.load_image_set(config.data, split=split)
            rows = rows_of(images, config.rows, seed=config.seed)
            for kind in config.views:
                views = features.views_of(encoder, kind, fit=config.fit, seed=config.seed)
                directory = workdir / _slug(spec) / f"{_slug(split)}_{_slug(kind)}"
                start = time.perf_counter()
                cache = features.extract(
                    encoder,
                    images,
                    directory,
                    views=views,
                    rows=rows,
                    batch_size=config.batch_size,
                    dtype=config.dtype,
                )
                processes.barrier(f"features {directory.name}")
                seconds = time.perf_counter() - start
                logging.info("%s: %d rows in %.1f s", directory, len(rows), seconds)
                files = directory.glob("*.array_record")
                table.append(
                    {
                        "cache": f"{_slug(spec)}/{directory.name}",
                        "pictures": len(rows),
                        "views": views.count,
                        "features": encoder.num_features,
                        "logits": encoder.num_classes,
                        "MB": sum(path.stat().length for path in files) / 1e6,
                        "seconds": seconds,
                    }
                )
                del cache
    if jax.process_index() == 0:
        text = markdown_table(table)
        (workdir / "report.md").write_text(text + "\n")
        print(text)


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)
