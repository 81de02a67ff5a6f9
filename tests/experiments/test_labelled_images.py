"""Pictures of experiments as arrays: folders, CIFAR-100, and Fashion-MNIST of Debian's package."""

import gzip
import struct

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
from experiments.dual_head import images
from experiments.shared import fashion_mnist
from logitjax import data


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
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    found = images.load_images(source, split="test")
    order = np.argsort(found.labels)
    assert found.images.shape == (5, 28, 28, 1)
    np.testing.assert_array_equal(found.images[order, ..., 0], pictures["t10k"])
    with pytest.raises(ValueError, match="idx3"):
        fashion_mnist.read_idx(manual / "train-images-idx3-ubyte.gz", 2049)
    monkeypatch.setattr(fashion_mnist.FashionMnistPng, "PLACES", ("nowhere",))
    with pytest.raises(FileNotFoundError, match="apt-get download dataset-fashion-mnist"):
        data.load_image_set(source, split="train", data_dir=tmp_path / "other")


def test_cifar100_binary(tmp_path, monkeypatch):
    monkeypatch.setitem(images._CIFAR_LENGTH, "test", 3)
    planes = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    labels = [(1, 7), (2, 99), (3, 0)]
    records = [bytes(pair) + plane.tobytes() for pair, plane in zip(labels, planes)]
    (tmp_path / "test.bin").write_bytes(b"".join(records))
    found = images.load_images(f"cifar100:{tmp_path}", split="test")
    assert found.labels.tolist() == [7, 99, 0]
    np.testing.assert_array_equal(found.images, planes.transpose(0, 2, 3, 1))
    (tmp_path / "test.bin").write_bytes(b"".join(records[:2]))
    with pytest.raises(ValueError, match=r"test\.bin"):
        images.load_images(f"cifar100:{tmp_path}", split="test")
    with pytest.raises(FileNotFoundError, match=r"train\.bin"):
        images.load_images(f"cifar100:{tmp_path}")


def test_folders_of_classes(tmp_path):
    from PIL import Image

    for name, value in (("cat", 10), ("dog", 200)):
        folder = tmp_path / "val" / name / "images"
        folder.mkdir(parents=True)
        for number, size in enumerate([(8, 8), (12, 9)]):
            Image.new("RGB", size, (value, 0, 0)).save(folder / f"{number}.png")
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        found = images.load_images(f"folder:{tmp_path}", split="val", size=6, cache_dir=cache)
        assert found.images.shape == (4, 6, 6, 3)
        assert found.labels.tolist() == [0, 0, 1, 1]
        assert found.images[:, 0, 0, 0].tolist() == [10, 10, 200, 200]
    (tmp_path / "val" / "dog" / "broken.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.png"):
        images.load_images(f"folder:{tmp_path}", split="val", size=6)
