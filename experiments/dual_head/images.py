"""Labelled images as arrays of one size, to train a classifier on."""

import dataclasses
import os
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from logitjax import data
from logitjax.storage.weights import read_npy

_CIFAR = {"train": "train.bin", "test": "test.bin"}
_CIFAR_LENGTH = {"train": 50_000, "test": 10_000}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images and their classes, of which there are `num_classes`, whether or not all occur."""

    # uint8 [count, height, width, channels], perhaps a memory map.
    images: np.ndarray
    labels: np.ndarray  # int32 [count]
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)


def load_images(
    spec: str, *, split: str = "train", size: int = 32, cache_dir: epath.Path | None = None
) -> LabelledImages:
    """Images from `cifar100:DIR`, CIFAR-100's binary version, or from `data.load_image_set`.

    Those of `folder:DIR` are scaled so that the shorter side has `size` pixels, and cropped to the
    middle. They are kept in `cache_dir`, if given, as a memory map.
    """
    kind, _, location = spec.partition(":")
    if kind == "cifar100":
        return _cifar100(epath.Path(location), split)
    pictures = data.load_image_set(spec, split=split)
    classes = len(pictures.class_names)
    if kind == "folder":
        cache = cache_dir and cache_dir / f"{split}_{size}_{len(pictures)}.npy"
        images = _squares(pictures, size, cache)
        return LabelledImages(images=images, labels=pictures.labels, num_classes=classes)
    images, labels = zip(*pictures)
    images = np.stack(images)
    # Grey pictures have three equal channels.
    images = images[..., :1] if (images == images[..., :1]).all() else images
    return LabelledImages(images=images, labels=np.asarray(labels, np.int32), num_classes=classes)


def _cifar100(directory: epath.Path, split: str) -> LabelledImages:
    if split not in _CIFAR:
        raise ValueError(f"cifar100 has the splits train and test, not {split!r}")
    path = directory / _CIFAR[split]
    if not path.exists():
        raise FileNotFoundError(f"{path}: unpack cifar-100-binary.tar.gz there")
    content = np.frombuffer(path.read_bytes(), np.uint8)
    if content.size != _CIFAR_LENGTH[split] * 3074:
        raise ValueError(f"{path} has {content.size} bytes, not {_CIFAR_LENGTH[split]} records")
    # Coarse label, fine label, planes of red, green and blue.
    records = content.reshape(-1, 3074)
    images = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return LabelledImages(
        images=np.ascontiguousarray(images), labels=records[:, 1].astype(np.int32), num_classes=100
    )


def _squares(pictures: data.ImageSet, size: int, cache: epath.Path | None) -> np.ndarray:
    shape = (len(pictures), size, size, 3)
    if cache is None:
        images = np.empty(shape, np.uint8)
        _decode(pictures, images)
        return images
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        # Memory-mapped: the file itself grows, so there is nothing to pass to `write_atomic`.
        partial = cache.with_name(cache.name + ".partial")
        mapped = np.lib.format.open_memmap(
            os.fspath(partial), mode="w+", dtype=np.uint8, shape=shape
        )
        _decode(pictures, mapped)
        mapped.flush()
        partial.rename(cache)
    return read_npy(cache, mapped=True)


def _decode(pictures: data.ImageSet, images: Any) -> None:
    size = images.shape[1]
    for number, (pixels, _) in enumerate(pictures):
        picture = Image.fromarray(pixels)
        scale = size / min(picture.size)
        width, height = (max(size, round(n * scale)) for n in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        images[number] = np.asarray(picture.crop((left, top, left + size, top + size)))
        if number % 10_000 == 9_999:
            logging.info("decoded %d of %d images", number + 1, len(pictures))
