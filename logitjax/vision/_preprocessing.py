"""What becomes of a picture before an encoder sees it."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from logitjax.ops import Array

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Size and colours an encoder was trained with.

    Attributes:
      size: height and width of its pictures.
      resize: the shorter side before ``size`` pixels are cut out of the middle.
      mean: of red, green and blue between 0 and 1.
      std: likewise.
      interpolation: between pixels when a picture is scaled.
    """

    size: int
    resize: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise ValueError(f"resize must be at least size ({self.size}), got {self.resize}")

    def resized(self, size: int) -> "Preprocessing":
        """The same for pictures of another size, cut out of as much of the picture."""
        return dataclasses.replace(self, size=size, resize=round(self.resize * size / self.size))

    def normalize(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[jax.Array, "*batch height width channels"]:
        """Whole numbers 0..255, or floats 0..1, to what the network takes."""
        x: Any = jnp.asarray(images)
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = x.astype(jnp.float32) / 255.0
        return (x.astype(jnp.float32) - jnp.array(self.mean)) / jnp.array(self.std)
