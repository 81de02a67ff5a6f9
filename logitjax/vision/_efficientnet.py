"""EfficientNet-Lite0: mobile inverted bottlenecks without squeeze-and-excitation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.vision._layers import DepthwiseConv, Features, Images, batch_norm, conv, global_mean

# Channels, blocks, kernel, stride of the first block, expansion.
_STAGES = (
    (16, 1, 3, 1, 1),
    (24, 2, 3, 2, 6),
    (40, 2, 5, 2, 6),
    (80, 3, 3, 2, 6),
    (112, 3, 5, 1, 6),
    (192, 4, 5, 2, 6),
    (320, 1, 3, 1, 6),
)


class _Block(nnx.Module):
    """Expand, filter each channel, project; a shortcut if the shape stays."""

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel: int,
        stride: int,
        expand: int,
        options: dict[str, Any],
    ):
        conv_options = {key: options[key] for key in ("dtype", "rngs")}
        wide = in_features * expand
        self.residual = stride == 1 and in_features == features
        # Otherwise a 1x1 convolution of the same width.
        self.expand = expand > 1
        if self.expand:
            self.expand_conv = conv(in_features, wide, 1, **conv_options)
            self.bn0 = batch_norm(wide, **options)
        self.depthwise_conv = DepthwiseConv(
            wide, kernel=kernel, stride=stride, same=True, **conv_options
        )
        self.bn1 = batch_norm(wide, **options)
        self.project_conv = conv(wide, features, 1, **conv_options)
        self.bn2 = batch_norm(features, **options)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        running, out = not train, x
        if self.expand:
            out = nnx.relu6(self.bn0(self.expand_conv(out), use_running_average=running))
        out = nnx.relu6(self.bn1(self.depthwise_conv(out), use_running_average=running))
        out = self.bn2(self.project_conv(out), use_running_average=running)
        return x + out if self.residual else out


class EfficientNetLite0(nnx.Module):
    """EfficientNet-Lite0: 4.7 million weights, 1280 features, made for 224 pixels.

    Tan and Le (arXiv 1905.11946) and the authors' Lite variants: ReLU6, no squeeze and excitation,
    TensorFlow's padding, variance epsilon 1e-3. Names as in the torch port without underscores.
    """

    classifier_name = "fc"

    def __init__(
        self, *, channels: int = 3, axis_name: str | None = None, dtype: Any = None, rngs: nnx.Rngs
    ):
        options = {"epsilon": 1e-3, "axis_name": axis_name, "dtype": dtype, "rngs": rngs}
        self.num_features = 1280
        self.conv_stem = conv(channels, 32, 3, stride=2, same=True, dtype=dtype, rngs=rngs)
        self.bn0 = batch_norm(32, **options)
        blocks, previous = [], 32
        for features, count, kernel, stride, expand in _STAGES:
            for block in range(count):
                # A stage downsamples once.
                step = stride if block == 0 else 1
                blocks.append(_Block(previous, features, kernel, step, expand, options))
                previous = features
        self.blocks = nnx.List(blocks)
        self.conv_head = conv(previous, self.num_features, 1, dtype=dtype, rngs=rngs)
        self.bn1 = batch_norm(self.num_features, **options)

    def __call__(self, images: Images, *, train: bool = False) -> Features:
        running = not train
        x = self.conv_stem(jnp.asarray(images))
        x = nnx.relu6(self.bn0(x, use_running_average=running))
        for block in self.blocks:
            x = block(x, train=train)
        x = nnx.relu6(self.bn1(self.conv_head(x), use_running_average=running))
        return global_mean(x)
