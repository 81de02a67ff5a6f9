"""Labelled images as arrays: what a classifier trains on."""

import collections
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from logitjax.data._examples import parse_split, slice_of
from logitjax.data._places import files_below
from logitjax.storage import guard, require
from logitjax.storage.weights import read_npy

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
# The longer side in shorter ones.
_LONGEST = 500
# What lies under these names. Pillow's reader of JPEG reads a camera's MPO too, and has no other.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
_CIFAR = {"train": "train.bin", "test": "test.bin"}
_CIFAR_LENGTH = {"train": 50_000, "test": 10_000}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images and their classes, `num_classes` of them, seen or not."""

    # uint8 [count, height, width, channels], perhaps a memory map.
    images: np.ndarray
    labels: np.ndarray  # int32 [count]
    num_classes: int
    source: str

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(
                "images: expected uint8 [count, height, width, channels], got "
                f"{self.images.dtype} {self.images.shape}"
            )
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels: expected one for each of {len(self.images)} images, got shape "
                f"{self.labels.shape}"
            )
        check_numbers(self.labels, self.num_classes, "labels")

    def __len__(self) -> int:
        return len(self.labels)


def load_images(
    spec: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    size: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> LabelledImages:
    """Labelled images from any of the usual places.

    * ``tfds:NAME``: a prepared tfds dataset with one image and one label, read without TensorFlow.
    * ``cifar100:DIR``: CIFAR-100's binary version (``train.bin``, ``test.bin``).
    * ``folder:DIR``: ``DIR/<split>/<class>/**/*.png|jpg|jpeg``, as ImageNet and Tiny-ImageNet lie
      after unpacking (Tiny-ImageNet's ``val`` sorted into classes). Needs ``size``; pictures are
      scaled so that the shorter side has it, and cut to the middle.
    * ``synthetic:CLASSES``: noisy prototypes, for tests.

    Args:
        split: a name, perhaps sliced: ``train[:45000]``, ``train[90%:]``.
        size: height and width of the result, for ``folder``.
        cache_dir: where ``folder`` keeps the decoded arrays as a memory map; else in memory.

    Raises:
        FileNotFoundError: nothing lies there.
        ValueError: an unknown source, or files that are not what they should be.

    >>> digits = load_images("synthetic:10", split="train[:100]")
    >>> digits.images.shape, digits.num_classes
    ((100, 16, 16, 3), 10)
    """
    kind, _, location = spec.partition(":")
    name, start, stop = parse_split(split)
    if kind == "tfds" and location:
        result = _tfds_images(location, name, data_dir)
    elif kind == "cifar100" and location:
        result = _cifar100(epath.Path(location), name)
    elif kind == "folder" and location:
        if size is None:
            raise ValueError("size: expected pixels for images from a folder, got None")
        result = _folder(epath.Path(location) / name, size, cache_dir)
    elif kind == "synthetic" and location.isdigit():
        result = _synthetic(int(location), name)
    else:
        raise ValueError(
            f"unknown image source {spec!r}: expected tfds:NAME, cifar100:DIR, folder:DIR or "
            "synthetic:CLASSES"
        )
    images, labels, classes = result
    rows = slice_of(start, stop, len(labels))
    return LabelledImages(
        images=images[rows],
        labels=np.asarray(labels[rows], np.int32),
        num_classes=classes,
        source=f"{spec}[{split}]",
    )


def _tfds_images(
    name: str, split: str, data_dir: str | os.PathLike[str] | None
) -> tuple[np.ndarray, np.ndarray, int]:
    builder, picture, label = open_labelled_images(name, split, data_dir)
    rows: Any = builder.as_data_source(split=split)
    images = np.stack([as_bytes(row[picture]) for row in rows])
    labels = np.array([row[label] for row in rows], np.int32)
    return images, labels, int(builder.info.features[label].num_classes)


def open_labelled_images(
    name: str, split: str, data_dir: str | os.PathLike[str] | None
) -> tuple[Any, str, str]:
    """A prepared tfds dataset and which of its features are the image and the label."""
    # tfds is slow to import, and the other sources do not need it.
    import tensorflow_datasets as tfds

    from logitjax.data._tfds import open_prepared

    builder = open_prepared(name, split=split, data_dir=data_dir, spec=f"tfds:{name}")
    features: Any = builder.info.features
    pictures = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    classes = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    # Masks are images too, and a coarser class a second label.
    picture = "image" if "image" in pictures else (pictures[0] if len(pictures) == 1 else None)
    label = "label" if "label" in classes else (classes[0] if len(classes) == 1 else None)
    if picture is None or label is None:
        raise ValueError(f"tfds:{name} does not have one image and one label: {sorted(features)}")
    return builder, picture, label


def _cifar100(directory: epath.Path, split: str) -> tuple[np.ndarray, np.ndarray, int]:
    if split not in _CIFAR:
        raise ValueError(f"cifar100 has the splits train and test, not {split!r}")
    path = directory / _CIFAR[split]
    if not path.exists():
        raise FileNotFoundError(f"{path}: unpack cifar-100-binary.tar.gz there")
    data = np.frombuffer(path.read_bytes(), np.uint8)
    if data.size != _CIFAR_LENGTH[split] * 3074:
        raise ValueError(f"{path} has {data.size} bytes, not {_CIFAR_LENGTH[split]} records")
    # Coarse label, fine label, planes of red, green and blue.
    records = data.reshape(-1, 3074)
    images = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 1].astype(np.int32), 100


def _folder(
    directory: epath.Path, size: int, cache_dir: str | os.PathLike[str] | None
) -> tuple[np.ndarray, np.ndarray, int]:
    files, classes = class_folders(directory)
    labels = np.array([label for _, label in files], np.int32)
    shape = (len(files), size, size, 3)
    if cache_dir is None:
        images = np.empty(shape, np.uint8)
        _decode([path for path, _ in files], images)
        return images, labels, len(classes)
    cache = epath.Path(cache_dir) / f"{directory.name}_{size}_{len(files)}.npy"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        # Memory-mapped, so what grows is the file: nothing that `write_atomic` could be given.
        partial = cache.with_name(cache.name + ".partial")
        mapped = np.lib.format.open_memmap(
            os.fspath(partial), mode="w+", dtype=np.uint8, shape=shape
        )
        _decode([path for path, _ in files], mapped)
        mapped.flush()
        partial.rename(cache)
    return read_npy(cache, mapped=True), labels, len(classes)


def class_folders(directory: epath.Path) -> tuple[list[tuple[epath.Path, int]], list[str]]:
    """Pictures and their classes' numbers; the classes' names, sorted, numbers as such."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no image folder {directory}")
    classes = sorted(
        path.name for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if all(name.isdecimal() for name in classes):
        # ImageNet-V2 has 0, 1, ... 999.
        classes.sort(key=int)
    files: list[tuple[epath.Path, int]] = []
    for number, name in enumerate(classes):
        files += [(path, number) for path in pictures_below(directory / name)]
    if not files:
        raise ValueError(f"{directory} has no class folders with images")
    _report_skipped(directory, classes)
    return files, classes


def _report_skipped(directory: epath.Path, classes: Sequence[str]) -> None:
    """Counts the files of class folders that are not read, such as `.tiff` and `.heic`."""
    suffixes = [p.suffix.lower() for name in classes for p in files_below(directory / name)]
    skipped = collections.Counter(suffix for suffix in suffixes if suffix not in _SUFFIXES)
    if skipped:
        counts = ", ".join(
            f"{count} {suffix or 'without one'}" for suffix, count in skipped.items()
        )
        logging.warning(
            "%s: skipped %d files that are not %s: %s",
            directory,
            skipped.total(),
            ", ".join(_SUFFIXES),
            counts,
        )


def pictures_below(directory: epath.Path) -> list[epath.Path]:
    items = [p for p in files_below(directory) if p.suffix.lower() in _SUFFIXES]
    return sorted(items, key=os.fspath)


# Cameras save pixels as the sensor lay, and in EXIF how they are to be turned.
_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


def read_picture(path: epath.Path) -> Any:
    """A PIL image in RGB, upright; what is transparent lies on white."""
    return open_picture(path)[0]


def open_picture(path: epath.Path) -> tuple[Any, frozenset[str]]:
    """As `read_picture`, and what was done to it: `turned`, `transparent` or both."""
    Image = require("PIL.Image", extra="vision")

    with guard.naming(path, "an image"), path.open("rb") as file:
        guard.plain_file(path)
        # Pillow knows this format only once its module is there.
        require("PIL.WebPImagePlugin", extra="vision")
        # Other formats are large surfaces: Pillow runs Ghostscript for PostScript in a .png.
        picture = Image.open(file, formats=_FORMATS)
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
        width, height = picture.size
        guard.whole(width * height, "pixels", least=1, most=guard.LIMITS.pixels)
        # Scaled to 224 pixels, a line of pixels would be 224 times as long.
        guard.whole(max(width, height), "longer side", most=_LONGEST * min(width, height))
        if picture.mode.startswith("I"):
            # Pillow cuts greys of 16 bits off at 255; those of a file of that kind go to 65,535.
            picture = Image.fromarray(as_bytes(np.asarray(picture).clip(0).astype(np.uint16)))
        done = {"turned"} if turn else set()
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture, clear = _on_white(picture)
            done |= {"transparent"} if clear else set()
        picture = picture.convert("RGB")
        if turn:
            picture = picture.transpose(Image.Transpose[turn])
        return picture, frozenset(done)


def _on_white(picture: Any) -> tuple[Any, bool]:
    Image = require("PIL.Image", extra="vision")

    out, clear = Image.new("RGB", picture.size), False
    # In bands, for whole pictures of four bytes a pixel would be held four times.
    for top in range(0, picture.height, 256):
        box = (0, top, picture.width, min(top + 256, picture.height))
        band = picture.crop(box).convert("RGBA")
        ground = Image.new("RGBA", band.size, "white")
        ground.alpha_composite(band)
        clear = clear or band.getchannel("A").getextrema()[0] < 255
        out.paste(ground.convert("RGB"), box)
    return out, clear


def check_numbers(numbers: np.ndarray, count: int, name: str) -> None:
    """Refuses what are not integers from 0 to count - 1, without jax, which files need not."""
    if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, got {numbers.dtype}")
    wrong = np.flatnonzero((numbers < 0) | (numbers >= count))
    if wrong.size:
        got = f"{numbers[wrong[0]]} at {wrong[0]}"
        raise ValueError(f"{name}: expected 0 to {count - 1}, got {got}")


def as_bytes(pixels: Any) -> np.ndarray:
    """Pixels of 8 or 16 bits as uint8."""
    pixels = np.asarray(pixels)
    if pixels.dtype == np.uint16:
        # 65,535 is 255 and half-way is half-way: the nearest of pixels / 257.
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels: expected uint8 or uint16, got {pixels.dtype}")
    return pixels


def _decode(paths: Sequence[epath.Path], images: np.ndarray) -> None:
    Image = require("PIL.Image", extra="vision")

    size = images.shape[1]
    for number, path in enumerate(paths):
        picture = read_picture(path)
        scale = size / min(picture.size)
        width, height = (max(size, round(n * scale)) for n in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        images[number] = np.asarray(picture.crop((left, top, left + size, top + size)))
        if number % 10_000 == 9_999:
            logging.info("decoded %d of %d images", number + 1, len(paths))


def _synthetic(classes: int, split: str) -> tuple[np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 256, (classes, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    rng = np.random.default_rng({"train": 1, "validation": 2}.get(split, 3))
    labels = rng.integers(classes, size=2048 if split == "train" else 512)
    noise = rng.normal(scale=60, size=(len(labels), 16, 16, 3))
    images = np.clip(prototypes[labels] + noise, 0, 255).astype(np.uint8)
    return images, labels.astype(np.int32), classes
