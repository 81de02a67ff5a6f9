"""Fashion-MNIST of the Debian package as a data set of tfds."""

import gzip
import struct

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
from experiments.shared import fashion_mnist
from logitjax.data import load_images


def idx(values: np.ndarray) -> bytes:
    magic = 2048 + values.ndim
    return gzip.compress(
        struct.pack(f">{1 + values.ndim}i", magic, *values.shape) + values.tobytes()
    )


def test_fashion_mnist_is_built_from_the_debian_files(tmp_path, monkeypatch):
    source = "tfds:experiments.shared.fashion_mnist:FashionMnistPng"
    rng = np.random.default_rng(0)
    manual = tmp_path / "downloads" / "manual" / fashion_mnist._FOLDER
    manual.mkdir(parents=True)
    pictures = {}
    for name, count in (("train", 12), ("t10k", 5)):
        pictures[name] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (manual / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(pictures[name]))
        (manual / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    found = load_images(source, split="test", data_dir=tmp_path)
    order = np.argsort(found.labels)
    np.testing.assert_array_equal(found.images[order, ..., 0], pictures["t10k"])
    with pytest.raises(ValueError, match="idx3"):
        fashion_mnist.read_idx(manual / "train-images-idx3-ubyte.gz", 2049)
    monkeypatch.setattr(fashion_mnist.FashionMnistPng, "PLACES", ("nowhere",))
    with pytest.raises(FileNotFoundError, match="apt-get download dataset-fashion-mnist"):
        load_images(source, data_dir=tmp_path / "other")
