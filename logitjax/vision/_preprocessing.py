"""Preprocessing of pictures before an encoder sees them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from logitjax.ops import Array, checks

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# From a half, of floats that are to lie in 0..1: bicubic weights overshoot by less than a fifth.
_FURTHEST = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Size and colours an encoder was trained with.

    Attributes:
        size: height and width of its pictures.
        resize: the shorter side before ``size`` pixels are cut out of the middle.
        mean: mean of red, green and blue between 0 and 1.
        std: likewise.
        interpolation: between pixels when a picture is scaled.
        fit: whether a picture that is no square loses its margins (``crop``) or its proportions
            (``squash``).
    """

    size: int
    resize: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    fit: Literal["crop", "squash"] = "crop"

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise ValueError(f"resize: expected at least size ({self.size}), got {self.resize}")

    @classmethod
    def of_names(cls, fields: Mapping[str, Any], default: "Preprocessing", **sizes: Any) -> Any:
        """With `mean`, `std` and `interpolation` of a file, and the default's where it has none."""
        interpolation = fields.get("interpolation") or "bicubic"
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation: expected bilinear or bicubic, got {interpolation!r}")
        colours = {
            name: tuple(fields.get(name) or getattr(default, name)) for name in ("mean", "std")
        }
        return dataclasses.replace(default, interpolation=interpolation, **colours, **sizes)

    def resized(self, size: int) -> "Preprocessing":
        """The same for pictures of another size, cut out of as much of the picture."""
        return dataclasses.replace(self, size=size, resize=round(self.resize * size / self.size))

    def normalize(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[jax.Array, "*batch height width channels"]:
        """Whole numbers 0..255, or floats 0..1, to what the network takes.

        Interpolation may overshoot a little; what is further off, as floats of 0..255, becomes nan.
        """
        x: Any = jnp.asarray(images)
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = x.astype(jnp.float32) / 255.0
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"images: expected whole numbers or floats, got {x.dtype}")
        x = x.astype(jnp.float32)
        x = jnp.where(jnp.abs(x - 0.5) <= _FURTHEST, x, jnp.nan)  # nan stays nan
        return (x - jnp.array(self.mean)) / jnp.array(self.std)

    def check(self, images: Any) -> None:
        """Refuses pictures that are none, as far as they can be looked at outside of `jit`."""
        if images.ndim != 4 or images.shape[-1] != len(self.mean) or 0 in images.shape:
            raise ValueError(
                f"images: expected [batch, height, width, {len(self.mean)}], got {images.shape}"
            )
        if images.dtype == np.uint8:
            return
        is_integer = jnp.issubdtype(images.dtype, jnp.integer)
        low, high = (0, 255) if is_integer else (0.5 - _FURTHEST, 0.5 + _FURTHEST)
        expected = "whole numbers 0 to 255" if is_integer else "floats 0 to 1"
        checks.values(images, lambda x: (x >= low) & (x <= high), "images", expected)
