"""Picture files: finding them, and reading their pixels."""

import collections
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from logitjax.data._places import files_below
from logitjax.storage import guard, require

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
# Maximum aspect ratio.
_LONGEST = 500
# Formats behind these suffixes. Pillow reads a camera's MPO through its JPEG reader.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")


def open_labelled_images(
    name: str, split: str, data_dir: str | os.PathLike[str] | None
) -> tuple[Any, str, str]:
    """Open a prepared tfds dataset, and find its features for image and label."""
    # tfds is slow to import, and the other sources do not need it.
    import tensorflow_datasets as tfds

    from logitjax.data._tfds import open_prepared

    builder = open_prepared(name, split=split, data_dir=data_dir, spec=f"tfds:{name}")
    features: Any = builder.info.features
    pictures = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    classes = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    # Masks are images too, and a coarser class is a second label.
    picture = "image" if "image" in pictures else (pictures[0] if len(pictures) == 1 else None)
    label = "label" if "label" in classes else (classes[0] if len(classes) == 1 else None)
    if picture is None or label is None:
        raise ValueError(f"tfds:{name} does not have one image and one label: {sorted(features)}")
    return builder, picture, label


def class_folders(directory: epath.Path) -> tuple[list[tuple[epath.Path, int]], list[str]]:
    """Pictures with class numbers, and class names, sorted (numerically if they are numbers)."""
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
    """Log the number of files in class folders that are not read, such as `.tiff` and `.heic`."""
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


# Cameras save pixels in the sensor's orientation, and the required rotation in EXIF.
_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


def read_picture(path: epath.Path) -> Any:
    """Read a PIL image in RGB, upright, with transparent parts on white."""
    return open_picture(path)[0]


def open_picture(path: epath.Path) -> tuple[Any, frozenset[str]]:
    """Like `read_picture`, and also return the changes made: `turned`, `transparent` or both."""
    Image = require("PIL.Image", extra="vision")

    with guard.naming(path, "an image"), path.open("rb") as file:
        guard.plain_file(path)
        # Pillow supports this format only if its module was imported.
        require("PIL.WebPImagePlugin", extra="vision")
        # Other formats are attack surface: Pillow runs Ghostscript for PostScript in a .png.
        picture = Image.open(file, formats=_FORMATS)
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
        width, height = picture.size
        guard.whole(width * height, "pixels", least=1, most=guard.LIMITS.pixels)
        # A line one pixel wide, scaled to 224 pixels, would be 224 times as long.
        guard.whole(max(width, height), "longer side", most=_LONGEST * min(width, height))
        if picture.mode.startswith("I"):
            # Pillow clips 16-bit greys at 255; in such files they go up to 65,535.
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
    # In bands, because a whole picture of four bytes per pixel would be held four times.
    for top in range(0, picture.height, 256):
        box = (0, top, picture.width, min(top + 256, picture.height))
        band = picture.crop(box).convert("RGBA")
        ground = Image.new("RGBA", band.size, "white")
        ground.alpha_composite(band)
        clear = clear or band.getchannel("A").getextrema()[0] < 255
        out.paste(ground.convert("RGB"), box)
    return out, clear


def check_numbers(numbers: np.ndarray, count: int, name: str) -> None:
    """Raise unless all are integers from 0 to count - 1; does not import jax."""
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
        # pixels / 257 to the nearest: 65,535 is 255.
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels: expected uint8 or uint16, got {pixels.dtype}")
    return pixels
