"""Features of pictures from a frozen encoder, stored on disk."""

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


def _identity(
    encoder: vision.Encoder, images: data.ImageSet, views: data.ImageViews, *, dtype: str
) -> FeatureIdentity:
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
) -> FeatureCache:
    """Encode pictures once with a frozen encoder, and store the features.

    Rows already in the directory are skipped, so a killed call continues when repeated. All views
    of a batch are encoded at once on this process's devices. Processes share the shards.

    Args:
        directory: Folder of the cache: empty, or a cache of the same encoder, pictures and views.
        views: Views of each picture, such as from `data.ImageViews.of`.
        rows: Numbers of the pictures, such as from `ImageSet.choose`; by default all.
        batch_size: Number of pictures encoded together, with all their views.
        dtype: Type on disk.

    Raises:
        TypeError: Rows that are not integers, such as a mask.
        ValueError: The directory contains features of something else (it names the difference), or
            a row does not exist.
    """
    chosen = np.arange(len(images)) if rows is None else np.asarray(rows)
    checks.ids(chosen, len(images), "rows")
    total = batch_size * views.count
    devices = jax.local_devices()
    # A batch splits evenly.
    used = next(n for n in range(len(devices), 0, -1) if total % n == 0)
    mesh = jax.make_mesh((used,), ("data",), (AxisType.Auto,), devices=devices[:used])
    spread = NamedSharding(mesh, PartitionSpec("data"))
    # Replicated on each device.
    placed = encoder.placed(NamedSharding(mesh, PartitionSpec()))

    def fetch(row: int) -> tuple[np.ndarray, int]:
        picture, label = images[row]
        return views(picture, row=row), label

    # PIL decodes without the GIL.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def compute(chunk: np.ndarray) -> Features:
            fetched = list(pool.map(fetch, chunk.tolist()))
            pixels = np.concatenate([picture for picture, _ in fetched])
            features, logits = placed.encode(jax.device_put(pixels, spread))
            # Features or logits last.
            shape = (len(chunk), views.count, -1)
            # Nothing is waited for: `fill` takes this when the next batch has been dispatched.
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
            rows_per_shard=256,
            label=encoder.name,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return cache
