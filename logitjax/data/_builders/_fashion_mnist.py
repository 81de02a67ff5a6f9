"""Fashion-MNIST from the Debian package dataset-fashion-mnist, images stored as PNG."""

import io
import os
import struct
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from logitjax.data._builders._base import Builder
from logitjax.storage import guard, require

_INSTALL = (
    "apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb {manual_dir}"
)
_FOLDER = "usr/share/datasets/fashion-mnist"
_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
_FILES = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = 2051, 2049


class FashionMnistPng(Builder):
    """The 60,000 + 10,000 images; tfds' own ``fashion_mnist`` needs TensorFlow to prepare."""

    INSTALL = _INSTALL
    INFO: ClassVar = dict(
        description="Fashion-MNIST: 28x28 grey pictures of 10 kinds of clothes.",
        features={
            "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(_NAMES)),
        },
        supervised_keys=("image", "label"),
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        license="MIT",
    )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        # The property of the same name insists on the folder.
        folder = find_files(getattr(dl_manager, "_manual_dir", None))
        return {split: self._generate_examples(folder, name) for split, name in _FILES.items()}

    def _generate_examples(
        self, folder: os.PathLike[str], name: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        Image = require("PIL.Image", extra="vision")

        folder = epath.Path(folder)
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz", _IMAGES)
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz", _LABELS)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            # Only encoded bytes get into a dataset without TensorFlow.
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            file.seek(0)
            yield number, {"image": file, "label": int(label)}


def find_files(manual_dir: str | os.PathLike[str] | None = None) -> epath.Path:
    """Where the .deb was unpacked or is installed."""
    for location in (_FOLDER, ".", f"/{_FOLDER}"):
        # An absolute place stays itself.
        path = epath.Path(manual_dir or ".") / location
        if (path / "train-images-idx3-ubyte.gz").exists():
            return path
    raise FileNotFoundError(
        "fashion_mnist_png is made from a Debian package that is missing: "
        + _INSTALL.format(manual_dir=manual_dir or "MANUAL_DIR")
    )


def read_idx(path: os.PathLike[str], magic: int) -> np.ndarray:
    data = guard.gunzip(epath.Path(path).read_bytes(), os.fspath(path))
    axes = magic % 256
    header = struct.unpack_from(f">{1 + axes}i", data) if len(data) >= 4 + 4 * axes else (0,)
    shape, start = header[1:], 4 + 4 * axes
    if header[0] != magic or len(data) != start + int(np.prod(shape)):
        raise ValueError(f"{path} is not an IDX file of {axes} axes, or is cut short")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
