"""Wide residual networks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.vision._layers import batch_norm, conv, global_mean


class WideBlock(nnx.Module):
    """Normalise, activate, convolve, twice; a projection takes the activated input."""

    def __init__(self, in_features: int, features: int, stride: int, options: dict[str, Any]):
        conv_options = {key: options[key] for key in ("dtype", "rngs")}
        self.bn1 = batch_norm(in_features, **options)
        self.conv1 = conv(in_features, features, 3, stride=stride, **conv_options)
        self.bn2 = batch_norm(features, **options)
        self.conv2 = conv(features, features, 3, **conv_options)
        shortcut = None
        if in_features != features:
            shortcut = conv(in_features, features, 1, stride=stride, **conv_options)
        self.convShortcut = shortcut

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        active = nnx.relu(self.bn1(x, use_running_average=not train))
        out = nnx.relu(self.bn2(self.conv1(active), use_running_average=not train))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return self.conv2(out) + shortcut


class _Stage(nnx.Module):
    def __init__(
        self, in_features: int, features: int, blocks: int, stride: int, options: dict[str, Any]
    ):
        first = WideBlock(in_features, features, stride, options)
        rest = [WideBlock(features, features, 1, options) for _ in range(blocks - 1)]
        self.layer = nnx.List([first, *rest])

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        for block in self.layer:
            x = block(x, train=train)
        return x


class WideResNet(nnx.Module):
    """WRN-depth-widen: three stages of (depth - 4) / 6 pre-activation blocks.

    Args:
      depth: 16, 22, 28, 40, ...
      widen: factor of the stages' 16, 32 and 64 channels.
      channels: number of channels of the images.
      axis_name: mesh axis of the batch inside ``shard_map`` or ``pmap``; not needed under ``jit``.
      dtype: type of the computation; parameters stay float32.
      rngs: needs ``params``.

    Raises:
      ValueError: a depth that is not 6n + 4.

    References:
      Zagoruyko and Komodakis (arXiv 1605.07146); names as in mdistiller.
    """

    classifier_name = "fc"

    def __init__(
        self,
        depth: int,
        widen: int = 1,
        *,
        channels: int = 3,
        axis_name: str | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth: expected 6n + 4 (16, 22, 28, 40, ...), got {depth}")
        options = {"axis_name": axis_name, "dtype": dtype, "rngs": rngs}
        self.num_features = 64 * widen
        self.conv1 = conv(channels, 16, 3, dtype=dtype, rngs=rngs)
        self.block1 = _Stage(16, 16 * widen, blocks, 1, options)
        self.block2 = _Stage(16 * widen, 32 * widen, blocks, 2, options)
        self.block3 = _Stage(32 * widen, 64 * widen, blocks, 2, options)
        self.bn1 = batch_norm(64 * widen, **options)

    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> Float[jax.Array, "batch features"]:
        x = self.conv1(jnp.asarray(images))
        for stage in (self.block1, self.block2, self.block3):
            x = stage(x, train=train)
        return global_mean(nnx.relu(self.bn1(x, use_running_average=not train)))
