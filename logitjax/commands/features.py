"""Pictures through a frozen encoder, onto disk."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from logitjax import data, few_shot, vision


def views_of(
    encoder: vision.Encoder, spec: str, *, fit: str = "crop", seed: int = 0
) -> data.ImageViews:
    """``plain``, or ``random:COUNT``, of the size and with the interpolation an encoder takes."""
    kind, _, count = spec.partition(":")
    if kind not in ("plain", "random") or (kind == "random") != count.isdigit():
        raise ValueError(f"views must be plain or random:COUNT, got {spec!r}")
    made: Any = {"fit": fit, "kind": kind}  # checked there
    return data.ImageViews(
        size=encoder.preprocessing.size,
        resize=encoder.preprocessing.resize,
        interpolation=encoder.preprocessing.interpolation,
        count=int(count or 1),
        seed=seed if kind == "random" else 0,
        **made,
    )


def identity_of(
    encoder: vision.Encoder, images: data.ImageSet, views: data.ImageViews, *, dtype: str
) -> few_shot.FeatureIdentity:
    """What a cache of these will say it is made from."""
    colours = dataclasses.asdict(encoder.preprocessing)
    return few_shot.FeatureIdentity(
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


def extract(
    encoder: vision.Encoder,
    images: data.ImageSet,
    directory: epath.PathLike,
    *,
    views: data.ImageViews,
    rows: Any = None,
    batch_size: int = 16,
    dtype: str = "float16",
    rows_per_shard: int = 256,
) -> few_shot.FeatureCache:
    """Encode the rows (all when omitted) that ``directory`` does not hold yet.

    ``batch_size`` counts pictures; every view of them is encoded in one call, spread over this
    process's devices. Processes share the shards.
    """
    total = batch_size * views.count
    devices = jax.local_devices()
    used = next(n for n in range(len(devices), 0, -1) if total % n == 0)
    mesh = jax.make_mesh((used,), ("data",), (AxisType.Auto,), devices=devices[:used])
    spread = NamedSharding(mesh, PartitionSpec("data"))
    placed = encoder.placed(NamedSharding(mesh, PartitionSpec()))

    def fetch(row: int) -> tuple[np.ndarray, int]:
        picture, label = images[row]
        return views(picture, row=row), label

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def compute(chunk: np.ndarray) -> few_shot.Features:
            fetched = list(pool.map(fetch, chunk.tolist()))
            pixels = np.concatenate([picture for picture, _ in fetched])
            features, logits = placed.encode(jax.device_put(pixels, spread))
            shape = (len(chunk), views.count, -1)
            return few_shot.Features(
                features=features.reshape(shape),
                logits=None if logits is None else logits.reshape(shape),
                labels=np.array([label for _, label in fetched], np.int32),
            )

        cache = few_shot.FeatureCache(directory, identity_of(encoder, images, views, dtype=dtype))
        cache.fill(
            np.arange(len(images)) if rows is None else rows,
            compute,
            batch_size=batch_size,
            rows_per_shard=rows_per_shard,
            label=encoder.name,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return cache
