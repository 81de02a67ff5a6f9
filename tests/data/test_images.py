"""Labelled images: every source, and the builders on small stand-ins for their packages."""

import numpy as np
import pytest

from logitjax.data import _images, load_images


def test_synthetic_images_are_the_same_every_time():
    first, second = (load_images("synthetic:5", split="train[10:20]") for _ in range(2))
    np.testing.assert_array_equal(first.images, second.images)
    assert (len(first), first.num_classes, first.images.dtype) == (10, 5, np.uint8)
    other = load_images("synthetic:5", split="test[10:20]")
    assert (other.images != first.images).any()


def test_cifar100_binary(tmp_path, monkeypatch):
    monkeypatch.setitem(_images._CIFAR_LENGTH, "test", 3)
    planes = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    labels = [(1, 7), (2, 99), (3, 0)]
    records = [bytes(pair) + plane.tobytes() for pair, plane in zip(labels, planes)]
    (tmp_path / "test.bin").write_bytes(b"".join(records))
    loaded = load_images(f"cifar100:{tmp_path}", split="test")
    assert loaded.labels.tolist() == [7, 99, 0]
    np.testing.assert_array_equal(loaded.images, planes.transpose(0, 2, 3, 1))
    (tmp_path / "test.bin").write_bytes(b"".join(records[:2]))
    with pytest.raises(ValueError, match=r"test\.bin"):
        load_images(f"cifar100:{tmp_path}", split="test")
    with pytest.raises(FileNotFoundError, match=r"train\.bin"):
        load_images(f"cifar100:{tmp_path}")


def test_folders_of_classes(tmp_path):
    from PIL import Image

    for name, value in (("cat", 10), ("dog", 200)):
        folder = tmp_path / "val" / name / "images"
        folder.mkdir(parents=True)
        for number, size in enumerate([(8, 8), (12, 9)]):
            Image.new("RGB", size, (value, 0, 0)).save(folder / f"{number}.png")
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        loaded = load_images(f"folder:{tmp_path}", split="val", size=6, cache_dir=cache)
        assert loaded.images.shape == (4, 6, 6, 3)
        assert loaded.labels.tolist() == [0, 0, 1, 1]
        assert loaded.images[:, 0, 0, 0].tolist() == [10, 10, 200, 200]
    (tmp_path / "val" / "dog" / "broken.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.png"):
        load_images(f"folder:{tmp_path}", split="val", size=6)
    with pytest.raises(ValueError, match="size"):
        load_images(f"folder:{tmp_path}", split="val")


def test_unknown_sources_are_named():
    with pytest.raises(ValueError, match="nowhere:x"):
        load_images("nowhere:x")
