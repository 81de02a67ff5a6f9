"""Networks with weights in packages: EfficientNet-Lite0, convolutions of AlexNet and VGG-16."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.vision import _layers as layers
from logitjax.vision._layers import DepthwiseConv, Features, Images, normed_conv

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
    """Expansion, a filter of each channel, projection; a shortcut if the shape is unchanged."""

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel: int,
        stride: int,
        expand: int,
        options: dict[str, Any],
    ):
        wide = in_features * expand
        self.residual = stride == 1 and in_features == features
        # Without expansion it would be a 1x1 convolution of the same width.
        self.expand = expand > 1
        if self.expand:
            self.expand_conv, self.bn0 = normed_conv(in_features, wide, 1, options)
        shared = {key: options[key] for key in ("dtype", "rngs")}
        self.depthwise_conv = DepthwiseConv(wide, kernel=kernel, stride=stride, same=True, **shared)
        self.bn1 = layers.batch_norm(wide, **options)
        self.project_conv, self.bn2 = normed_conv(wide, features, 1, options)

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
        self.conv_stem, self.bn0 = normed_conv(channels, 32, 3, options, stride=2, same=True)
        blocks, previous = [], 32
        for features, count, kernel, stride, expand in _STAGES:
            for block in range(count):
                # Only the first block of a stage downsamples.
                step = stride if block == 0 else 1
                blocks.append(_Block(previous, features, kernel, step, expand, options))
                previous = features
        self.blocks = nnx.List(blocks)
        self.conv_head, self.bn1 = normed_conv(previous, self.num_features, 1, options)

    def __call__(self, images: Images, *, train: bool = False) -> Features:
        running = not train
        x = self.conv_stem(jnp.asarray(images))
        x = nnx.relu6(self.bn0(x, use_running_average=running))
        for block in self.blocks:
            x = block(x, train=train)
        x = nnx.relu6(self.bn1(self.conv_head(x), use_running_average=running))
        return layers.global_mean(x)


# (channels, kernel, stride, padding), or the kernel of a max-pooling of stride 2.
_ALEXNET = ((64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), 3)
_VGG16 = tuple(
    layer
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    for layer in ((width, 3, 1, 1),) * count + (2,)
)
_LAYERS: dict[str, tuple[Any, ...]] = {"alexnet": _ALEXNET, "vgg16": _VGG16}


class ConvFeatures(nnx.Module):
    """Convolutions with biases and ReLUs, max-poolings, and the mean over all positions.

    ``features`` is numbered like torchvision's ``features``. Pictures of any size work that leave
    something to pool: 63 pixels for `alexnet`, 32 for `vgg16`.
    """

    def __init__(self, network: str, *, dtype: Any = None, rngs: nnx.Rngs):
        modules: dict[str, Any] = {}
        order: list[tuple[str, int]] = []
        number, previous = 0, 3
        for layer in _LAYERS[network]:
            if isinstance(layer, int):
                order.append(("", layer))
                number += 1
                continue
            width, kernel, stride, pad = layer
            options: Any = dict(stride=stride, pad=pad, use_bias=True, dtype=dtype, rngs=rngs)
            modules[str(number)] = layers.conv(previous, width, kernel, **options)
            order.append((str(number), 0))
            # The ReLU has a number too.
            number, previous = number + 2, width
        self.features: Any = nnx.Dict(modules)
        self.order, self.num_features = tuple(order), previous

    def __call__(self, images: Images) -> Features:
        x = jnp.asarray(images)
        for name, pool in self.order:
            x = layers.max_pool(x, pool, 2) if pool else nnx.relu(self.features[name](x))
        return layers.global_mean(x)
