"""Fashion-MNIST from the Debian package dataset-fashion-mnist, images stored as PNG."""

import io
import os
import struct
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from experiments.shared.builder import Builder
from logitjax.storage import guard, require

_FOLDER = "usr/share/datasets/fashion-mnist"
_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
_FILES = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = 2051, 2049


class FashionMnistPng(Builder):
    """The 60,000 + 10,000 images; tfds' own `fashion_mnist` needs TensorFlow to prepare."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "apt-get download dataset-fashion-mnist && "
        "dpkg-deb -x dataset-fashion-mnist_*.deb {manual_dir}"
    )
    FEATURES: ClassVar = {
        "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=list(_NAMES)),
    }
    # Unpacked by hand, or installed.
    PLACES = (_FOLDER, ".", f"/{_FOLDER}")
    FILE = "train-images-idx3-ubyte.gz"

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        folder = self.folder(dl_manager)
        return {split: self._generate_examples(folder, name) for split, name in _FILES.items()}

    def _generate_examples(
        self, folder: epath.Path, name: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        Image = require("PIL.Image", extra="vision")

        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz", _IMAGES)
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz", _LABELS)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            # Only encoded bytes get into a dataset without TensorFlow.
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            file.seek(0)
            yield number, {"image": file, "label": int(label)}


def read_idx(path: os.PathLike[str], magic: int) -> np.ndarray:
    """The array of an IDX file whose first number is `magic`."""
    data = guard.gunzip(epath.Path(path).read_bytes(), os.fspath(path))
    axes = magic % 256
    header = struct.unpack_from(f">{1 + axes}i", data) if len(data) >= 4 + 4 * axes else (0,)
    shape, start = header[1:], 4 + 4 * axes
    if header[0] != magic or len(data) != start + int(np.prod(shape)):
        raise ValueError(f"{path} is not an IDX file of {axes} axes, or is cut short")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
