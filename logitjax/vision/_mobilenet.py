"""MobileNetV2 in the half-width form used on small images."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.vision._layers import DepthwiseConv, batch_norm, conv, global_mean

# Channels at full width, blocks, stride of the first block; the expansion is 1, then 6.
_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class InvertedResidual(nnx.Module):
    """Expand, filter each channel, project; ``conv`` is numbered as torch counts the layers."""

    def __init__(
        self, in_features: int, features: int, stride: int, expand: int, options: dict[str, Any]
    ):
        conv_options = {key: options[key] for key in ("dtype", "rngs")}
        wide = in_features * expand
        self.residual = stride == 1 and in_features == features
        self.conv: Any = nnx.Dict(
            {
                "0": conv(in_features, wide, 1, **conv_options),
                "1": batch_norm(wide, **options),
                "3": DepthwiseConv(wide, stride=stride, **conv_options),
                "4": batch_norm(wide, **options),
                "6": conv(wide, features, 1, **conv_options),
                "7": batch_norm(features, **options),
            }
        )

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        layers, running = self.conv, not train
        out = nnx.relu(layers["1"](layers["0"](x), use_running_average=running))
        out = nnx.relu(layers["4"](layers["3"](out), use_running_average=running))
        out = layers["7"](layers["6"](out), use_running_average=running)
        return x + out if self.residual else out


class MobileNetV2(nnx.Module):
    """MobileNetV2 with a stem of stride 2 and 32-pixel strides.

    Args:
      width: factor of the channels; the last layer has at least 1280.
      expand: expansion of the inverted residuals.
      channels: number of channels of the images.
      axis_name: mesh axis of the batch inside ``shard_map`` or ``pmap``; not needed under ``jit``.
      dtype: type of the computation; parameters stay float32.
      rngs: needs ``params``.

    References:
      Sandler et al. (arXiv 1801.04381); strides, the half width and names as in mdistiller.
    """

    classifier_name = "classifier.0"

    def __init__(
        self,
        width: float = 0.5,
        expand: int = 6,
        *,
        channels: int = 3,
        axis_name: str | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        options = {"axis_name": axis_name, "dtype": dtype, "rngs": rngs}
        previous = int(32 * width)
        self.num_features = int(1280 * width) if width > 1 else 1280
        stem = conv(channels, previous, 3, stride=2, dtype=dtype, rngs=rngs)
        self.conv1: Any = nnx.List([stem, batch_norm(previous, **options)])
        stages = []
        for number, (base, blocks, stride) in enumerate(_STAGES):
            features = int(base * width)
            stage = []
            for block in range(blocks):
                step, factor = (stride if block == 0 else 1), (expand if number else 1)
                stage.append(InvertedResidual(previous, features, step, factor, options))
                previous = features
            stages.append(nnx.List(stage))
        self.blocks = nnx.List(stages)
        last = conv(previous, self.num_features, 1, dtype=dtype, rngs=rngs)
        self.conv2: Any = nnx.List([last, batch_norm(self.num_features, **options)])

    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> Float[jax.Array, "batch features"]:
        running = not train
        x = nnx.relu(self.conv1[1](self.conv1[0](jnp.asarray(images)), use_running_average=running))
        for stage in self.blocks:
            for block in stage:
                x = block(x, train=train)
        return global_mean(nnx.relu(self.conv2[1](self.conv2[0](x), use_running_average=running)))
