"""ShuffleNetV2 in the form used on small images."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.vision._layers import DepthwiseConv, batch_norm, conv, global_mean

_WIDTHS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (224, 488, 976, 2048),
}
_BLOCKS = (3, 7, 3)


def _shuffle(x: jax.Array) -> jax.Array:
    """Interleave the two halves of the channels."""
    *rest, features = x.shape
    return x.reshape(*rest, 2, features // 2).swapaxes(-1, -2).reshape(*rest, features)


class ShuffleBlock(nnx.Module):
    """Half of the channels pass through, the other half is transformed."""

    def __init__(self, features: int, options: dict[str, Any]):
        conv_options = {key: options[key] for key in ("dtype", "rngs")}
        half = features // 2
        self.conv1 = conv(half, half, 1, **conv_options)
        self.bn1 = batch_norm(half, **options)
        self.conv2 = DepthwiseConv(half, **conv_options)
        self.bn2 = batch_norm(half, **options)
        self.conv3 = conv(half, half, 1, **conv_options)
        self.bn3 = batch_norm(half, **options)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        running = not train
        kept, out = jnp.split(x, 2, -1)
        out = nnx.relu(self.bn1(self.conv1(out), use_running_average=running))
        out = self.bn2(self.conv2(out), use_running_average=running)
        out = nnx.relu(self.bn3(self.conv3(out), use_running_average=running))
        return _shuffle(jnp.concatenate([kept, out], -1))


class DownBlock(nnx.Module):
    """Both branches halve the image; together they widen it."""

    def __init__(self, in_features: int, features: int, options: dict[str, Any]):
        conv_options = {key: options[key] for key in ("dtype", "rngs")}
        half = features // 2
        self.conv1 = DepthwiseConv(in_features, stride=2, **conv_options)
        self.bn1 = batch_norm(in_features, **options)
        self.conv2 = conv(in_features, half, 1, **conv_options)
        self.bn2 = batch_norm(half, **options)
        self.conv3 = conv(in_features, half, 1, **conv_options)
        self.bn3 = batch_norm(half, **options)
        self.conv4 = DepthwiseConv(half, stride=2, **conv_options)
        self.bn4 = batch_norm(half, **options)
        self.conv5 = conv(half, half, 1, **conv_options)
        self.bn5 = batch_norm(half, **options)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        running = not train
        left = self.bn1(self.conv1(x), use_running_average=running)
        left = nnx.relu(self.bn2(self.conv2(left), use_running_average=running))
        right = nnx.relu(self.bn3(self.conv3(x), use_running_average=running))
        right = self.bn4(self.conv4(right), use_running_average=running)
        right = nnx.relu(self.bn5(self.conv5(right), use_running_average=running))
        return _shuffle(jnp.concatenate([left, right], -1))


class ShuffleNetV2(nnx.Module):
    """ShuffleNetV2 with a 1x1 stem and no pooling before the first stage.

    Args:
      size: 0.5, 1, 1.5 or 2.
      channels: number of channels of the images.
      axis_name: mesh axis of the batch inside ``shard_map`` or ``pmap``; not needed under ``jit``.
      dtype: type of the computation; parameters stay float32.
      rngs: needs ``params``.

    Raises:
      ValueError: an unknown size.

    References:
      Ma et al. (arXiv 1807.11164); the small-image form and names as in mdistiller.
    """

    classifier_name = "linear"

    def __init__(
        self,
        size: float = 1.0,
        *,
        channels: int = 3,
        axis_name: str | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if size not in _WIDTHS:
            raise ValueError(f"size: expected one of {sorted(_WIDTHS)}, got {size}")
        options = {"axis_name": axis_name, "dtype": dtype, "rngs": rngs}
        widths = _WIDTHS[size]
        self.num_features = widths[3]
        self.conv1 = conv(channels, 24, 1, dtype=dtype, rngs=rngs)
        self.bn1 = batch_norm(24, **options)
        previous, stages = 24, []
        for features, blocks in zip(widths, _BLOCKS):
            rest = [ShuffleBlock(features, options) for _ in range(blocks)]
            stages.append(nnx.List([DownBlock(previous, features, options), *rest]))
            previous = features
        self.layer1, self.layer2, self.layer3 = stages
        self.conv2 = conv(previous, widths[3], 1, dtype=dtype, rngs=rngs)
        self.bn2 = batch_norm(widths[3], **options)

    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> Float[jax.Array, "batch features"]:
        running = not train
        x = nnx.relu(self.bn1(self.conv1(jnp.asarray(images)), use_running_average=running))
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = block(x, train=train)
        return global_mean(nnx.relu(self.bn2(self.conv2(x), use_running_average=running)))
