"""Pictures through a frozen encoder, onto disk."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from logitjax import data, vision
from logitjax.few_shot._feature_cache import FeatureCache, FeatureIdentity, Features
from logitjax.ops import checks


def encoder_views(
    encoder: vision.Encoder, spec: str, *, fit: str = "crop", seed: int = 0
) -> data.ImageViews:
    """Views of pictures as an encoder takes them, in its size and by its interpolation.

    Args:
        encoder: The encoder that will read them.
        spec: `plain`, or `random:COUNT` for so many random crops of each picture.
        fit: How pictures become square: `crop` or `pad`. For encoders that were trained on squeezed
            pictures, `crop` squeezes instead.
        seed: Seed of random views.

    Raises:
        ValueError: The spec is neither.
    """
    kind, _, count = spec.partition(":")
    if kind not in ("plain", "random") or (kind == "random") != count.isdigit():
        raise ValueError(f"views: expected plain or random:COUNT, got {spec!r}")
    squash = fit == "crop" and encoder.preprocessing.fit == "squash"
    made: Any = {"fit": "squash" if squash else fit, "kind": kind}  # checked there
    return data.ImageViews(
        size=encoder.preprocessing.size,
        resize=encoder.preprocessing.resize,
        interpolation=encoder.preprocessing.interpolation,
        count=int(count or 1),
        seed=seed if kind == "random" else 0,
        **made,
    )


def _identity(
    encoder: vision.Encoder, images: data.ImageSet, views: data.ImageViews, *, dtype: str
) -> FeatureIdentity:
    """What a cache of these will say it is made from."""
    colours = dataclasses.asdict(encoder.preprocessing)
    return FeatureIdentity(
        encoder=encoder.name,
        encoder_fingerprint=encoder.fingerprint,
        preprocessing=" ".join(f"{k}={colours[k]}" for k in ("mean", "std")),
        views=str(views),
        data=images.source,
        data_fingerprint=images.fingerprint,
        class_names=images.class_names,
        num_views=views.count,
        num_features=encoder.num_features,
        num_logits=encoder.num_classes,
        compute_dtype=encoder.dtype,
        dtype=dtype,
    )


def extract_features(
    encoder: vision.Encoder,
    images: data.ImageSet,
    directory: epath.PathLike,
    *,
    views: data.ImageViews,
    rows: Any = None,
    batch_size: int = 16,
    dtype: str = "float16",
    rows_per_shard: int = 256,
) -> FeatureCache:
    """Encode pictures once by a frozen encoder, and keep the features.

    Rows that the directory already holds are left alone, so a killed call continues when it is
    repeated. All views of a batch are encoded in one call, spread over this process's devices.
    Processes share the shards.

    Args:
        encoder: The frozen encoder.
        images: Pictures with their labels.
        directory: Folder of the cache: empty, or a cache of the same encoder, pictures and views.
        views: Views of each picture, from `encoder_views`.
        rows: Numbers of the pictures, from `choose_rows`; all if omitted.
        batch_size: Pictures encoded together, with all their views.
        dtype: Type on disk.
        rows_per_shard: Pictures a file.

    Raises:
        TypeError: Rows that are not integers, such as a mask.
        ValueError: The directory holds the features of something else (it says which part differs),
            or a row does not exist.
    """
    chosen = np.arange(len(images)) if rows is None else np.asarray(rows)
    checks.ids(chosen, len(images), "rows")
    total = batch_size * views.count
    devices = jax.local_devices()
    used = next(n for n in range(len(devices), 0, -1) if total % n == 0)  # a batch splits evenly
    mesh = jax.make_mesh((used,), ("data",), (AxisType.Auto,), devices=devices[:used])
    spread = NamedSharding(mesh, PartitionSpec("data"))
    placed = encoder.placed(NamedSharding(mesh, PartitionSpec()))

    def fetch(row: int) -> tuple[np.ndarray, int]:
        picture, label = images[row]
        return views(picture, row=row), label

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def compute(chunk: np.ndarray) -> Features:
            fetched = list(pool.map(fetch, chunk.tolist()))
            pixels = np.concatenate([picture for picture, _ in fetched])
            features, logits = placed.encode(jax.device_put(pixels, spread))
            shape = (len(chunk), views.count, -1)
            return Features(
                features=features.reshape(shape),
                logits=None if logits is None else logits.reshape(shape),
                labels=np.array([label for _, label in fetched], np.int32),
            )

        cache = FeatureCache(directory, _identity(encoder, images, views, dtype=dtype))
        cache.fill(
            chosen,
            compute,
            batch_size=batch_size,
            rows_per_shard=rows_per_shard,
            label=encoder.name,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return cache


def choose_rows(images: data.ImageSet, spec: str, *, seed: int = 0) -> np.ndarray:
    """Numbers of pictures by a spec, ascending.

    Args:
        images: Pictures to choose from.
        spec: `all`, a number counted from the start, or `per_class:N` at random.
        seed: Seed of the choice.

    Raises:
        ValueError: The spec is none of these.
    """
    if spec == "all":
        return np.arange(len(images))
    kind, _, number = spec.rpartition(":")
    if kind not in ("", "per_class") or not number.isdigit() or int(number) < 1:
        raise ValueError(f"rows: expected all, a number or per_class:N, got {spec!r}")
    if not kind:
        return np.arange(min(int(number), len(images)))
    # One order for every N: more pictures a class contain fewer.
    order = np.random.default_rng(seed).permutation(len(images))
    labels = images.labels[order]
    classes = range(len(images.class_names))
    return np.sort(np.concatenate([order[labels == c][: int(number)] for c in classes]))
