"""Views of pictures for an encoder: whole or cropped at random."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import UInt8

from logitjax.storage import guard, require

if TYPE_CHECKING:
    from logitjax.vision import Encoder

_ASPECT = (3 / 4, 4 / 3)  # torchvision's


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageViews:
    """Scaling, cropping and mirroring of pictures, a pure function of a picture and its row.

    Attributes:
        size: height and width of a view.
        resize: the shorter side before the middle is cut out of a plain view.
        interpolation: between pixels.
        fit: ``crop`` cuts off what lies beyond the square; ``pad`` puts the whole picture on a
            white square first, which suits drawings; ``squash`` scales both sides to ``size``.
        kind: ``plain`` is the one view that tests use; ``random`` cuts out a part, scales it to
            ``size`` and mirrors it half of the time.
        scale: smallest and largest share of the area that a random view keeps.
        floor: as of `vision.Encoder.preprocessing`, for plain views.

    >>> views = ImageViews(size=8, resize=9, kind="random", count=2)
    >>> views(np.zeros((20, 30, 3), np.uint8), row=5).shape
    (2, 8, 8, 3)
    """

    size: int
    resize: int
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    fit: Literal["crop", "pad", "squash"] = "crop"
    kind: Literal["plain", "random"] = "plain"
    count: int = 1
    scale: tuple[float, float] = (0.5, 1.0)
    seed: int = 0
    floor: bool = False

    def __post_init__(self) -> None:
        for name, existing in (
            ("fit", ("crop", "pad", "squash")),
            ("kind", ("plain", "random")),
            ("interpolation", ("bilinear", "bicubic")),
        ):
            if getattr(self, name) not in existing:
                raise ValueError(f"{name}: expected one of {existing}, got {getattr(self, name)!r}")
        if self.count < 1 or (self.kind == "plain" and self.count != 1):
            raise ValueError(f"count: expected at least 1, and 1 for plain views, got {self.count}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: expected two ascending shares of the area, got {self.scale}")

    @classmethod
    def of(cls, encoder: "Encoder", spec: str, *, fit: str = "crop", seed: int = 0) -> "ImageViews":
        """Build the views that an encoder takes, with its size and interpolation.

        Args:
            spec: `plain`, or `random:COUNT` for COUNT random crops of each picture.
            fit: `crop` (`squash` for encoders trained on squeezed pictures) or `pad`.

        Raises:
            ValueError: The spec is neither.
        """
        kind, _, count = spec.partition(":")
        if kind not in ("plain", "random") or (kind == "random") != count.isdigit():
            raise ValueError(f"views: expected plain or random:COUNT, got {spec!r}")
        squash = fit == "crop" and encoder.preprocessing.fit == "squash"
        options: Any = {"fit": "squash" if squash else fit, "kind": kind}  # checked there
        return cls(
            size=encoder.preprocessing.size,
            resize=encoder.preprocessing.resize,
            interpolation=encoder.preprocessing.interpolation,
            floor=encoder.preprocessing.floor,
            count=int(count or 1),
            # Plain views have no seed.
            seed=seed if kind == "random" else 0,
            **options,
        )

    def __str__(self) -> str:
        """Return the settings that determine the pixels, for manifests."""
        parts = [f"{self.kind} {self.size} px", self.fit, self.interpolation]
        if self.kind == "plain":
            cut = f"of {self.resize}{', floor' if self.floor else ''}"
            return " ".join([*parts, cut if self.fit == "crop" else "whole"])
        low, high = self.scale
        return " ".join([*parts, f"scale {low:g}-{high:g} seed {self.seed}"])

    def __call__(
        self, image: UInt8[np.ndarray, "height width 3"], *, row: int | np.integer
    ) -> UInt8[np.ndarray, "count size size 3"]:
        """Make the views of a picture; random ones depend on its number `row`.

        Raises:
            TypeError: pixels of another type, such as floats of 0..255.
            ValueError: another shape.
        """
        Image = require("PIL.Image", extra="vision")

        if image.dtype != np.uint8:
            raise TypeError(f"image: expected uint8, got {image.dtype}")
        if image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise ValueError(f"image: expected [height, width, 3], got shape {image.shape}")
        picture = Image.fromarray(image)
        if self.fit == "pad":
            picture = _on_white_square(picture)
        if self.kind == "plain":
            return self._plain(picture)[None]
        # A separate generator for each view, so that views are independent of each other.
        return np.stack(
            [
                self._random(picture, np.random.default_rng([self.seed, int(row), view]))
                for view in range(self.count)
            ]
        )

    @property
    def _filter(self) -> Any:
        Image = require("PIL.Image", extra="vision")

        return Image.Resampling[self.interpolation.upper()]

    def _plain(self, picture: Any) -> np.ndarray:
        size = self.size
        if self.fit == "squash":
            return np.asarray(picture.resize((size, size), self._filter))
        target = size if self.fit == "pad" else self.resize
        # Of halves torchvision's CenterCrop takes the even neighbour.
        short = min(picture.size)
        width, height = (target * n // short for n in picture.size)
        picture = picture.resize((width, height), self._filter)
        left, top = (n // 2 if self.floor else round(n / 2) for n in (width - size, height - size))
        return np.asarray(picture.crop((left, top, left + size, top + size)))

    def _random(self, picture: Any, rng: np.random.Generator) -> np.ndarray:
        # Crop first, so that the filter does not mix in pixels from outside.
        part = picture.crop(_random_box(picture.size, rng, self.scale))
        view = np.asarray(part.resize((self.size, self.size), self._filter))
        return view[:, ::-1] if rng.random() < 0.5 else view


def _on_white_square(picture: Any) -> Any:
    Image = require("PIL.Image", extra="vision")

    side = max(picture.size)
    guard.whole(side * side, "pixels of the white square", most=guard.LIMITS.pixels)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, tuple((side - n) // 2 for n in picture.size))
    return square


def _random_box(
    size: tuple[int, int], rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """torchvision's ``RandomResizedCrop``: ten tries, then the middle."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        # Uniform in logs, so that wide and tall crops are equally likely.
        ratio = math.exp(rng.uniform(*np.log(_ASPECT)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    low, high = _ASPECT
    w, h = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
