"""Preprocessing of pictures for an encoder, and the files that specify it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Num

from logitjax.ops import Array, checks
from logitjax.storage import read_json

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Distance from .5 allowed for floats in 0..1: bicubic weights overshoot by less than a fifth.
_FURTHEST = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Size and colours that an encoder was trained with.

    Attributes:
        size: height and width of its pictures.
        resize: the shorter side before ``size`` pixels are cropped from the middle.
        mean: mean of red, green and blue between 0 and 1.
        std: standard deviation, likewise.
        interpolation: interpolation for scaling pictures.
        fit: whether a picture that is not square loses its margins (``crop``) or its proportions
            (``squash``).
        floor: whether an odd margin is split with the smaller half first, as in transformers,
            instead of rounded as in torchvision.
    """

    size: int
    resize: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    fit: Literal["crop", "squash"] = "crop"
    floor: bool = False

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise ValueError(f"resize: expected at least size ({self.size}), got {self.resize}")

    @classmethod
    def of_names(cls, fields: Mapping[str, Any], default: "Preprocessing", **sizes: Any) -> Any:
        """The default with the `mean`, `std` and `interpolation` that a file gives."""
        interpolation = fields.get("interpolation") or "bicubic"
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation: expected bilinear or bicubic, got {interpolation!r}")
        colours = {
            name: tuple(fields.get(name) or getattr(default, name)) for name in ("mean", "std")
        }
        return dataclasses.replace(default, interpolation=interpolation, **colours, **sizes)

    def resized(self, size: int) -> "Preprocessing":
        """Preprocessing for pictures of another size, cropped to the same share of the picture."""
        return dataclasses.replace(self, size=size, resize=round(self.resize * size / self.size))

    def normalize(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[jax.Array, "*batch height width channels"]:
        """Convert integers 0..255, or floats 0..1, to the network's inputs.

        Interpolation may overshoot a little; values further off become nan.
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
        """Refuse invalid pictures, if they can be read outside `jit`."""
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


def processor_preprocessing(path: epath.Path, default: Preprocessing) -> Preprocessing:
    """Read transformers' ``preprocessor_config.json``, with the family's values as defaults."""
    file = path / "preprocessor_config.json"
    if not path.is_dir() or not file.exists():
        return default
    content = read_json(file, form=dict)

    def side(value: Any) -> int | None:
        if isinstance(value, Mapping):
            value = value.get("height") or value.get("shortest_edge")
        return int(value) if value else None

    scaled, cut = side(content.get("size")), side(content.get("crop_size"))
    size, resize, fit = default.size, default.resize, default.fit
    processor = f"{content.get('image_processor_type')} {content.get('feature_extractor_type')}"
    if "convnext" in processor.lower() and scaled:
        # Smaller pictures are cropped from larger ones, larger ones lose their proportions.
        share = content.get("crop_pct") or 224 / 256
        size, fit = scaled, "crop" if scaled < 384 else "squash"
        resize = int(scaled / share) if fit == "crop" else scaled
    elif scaled and cut and content.get("do_center_crop", True):
        size, resize, fit = cut, max(scaled, cut), "crop"
        message = content["size"]
        if scaled > cut and isinstance(message, Mapping) and "height" in message:
            raise ValueError(
                f"{file}: size: expected shortest_edge beside a crop_size that is smaller, got "
                f"{message}"
            )
    elif scaled:
        size, resize, fit = scaled, scaled, "squash"
    entries: dict[Any, Any] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
    fields = {
        "mean": content.get("image_mean"),
        "std": content.get("image_std"),
        "interpolation": entries.get(content.get("resample"), default.interpolation),
    }
    return Preprocessing.of_names(fields, default, size=size, resize=resize, fit=fit, floor=True)


def open_clip_preprocessing(default: Preprocessing, fields: Mapping[str, Any]) -> Preprocessing:
    """Read open_clip's ``preprocess_cfg``, with OpenAI's values as defaults."""
    mode = fields.get("resize_mode")
    if mode not in (None, "shortest", "squash"):
        raise ValueError(f"resize_mode: expected shortest or squash, got {mode!r}")
    return Preprocessing.of_names(fields, default, fit="squash" if mode == "squash" else "crop")
