"""ShuffleNetV2 1.0 in the form used on small images: the student of the paper's tables.

Ma et al. (arXiv 1807.11164). The small-image form, without pooling before the first stage, and the
names follow mdistiller, so that its checkpoints can be loaded.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def _norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)


class _Pointwise(nnx.Module):
    def __init__(self, in_features: int, features: int, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (1, 1, in_features, features)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[0, 0]


class _Depthwise(nnx.Module):
    """One 3x3 filter a channel, as nine multiplications: XLA's grouped convolution is slower."""

    def __init__(self, features: int, stride: int, rngs: nnx.Rngs):
        # torch counts fan-out over all channels although a filter feeds only one.
        std = math.sqrt(2.0 / (9 * features))
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (3, 3, 1, features)))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        step, padded = self.stride, jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = ((n - 1) // step * step + 1 for n in x.shape[1:3])
        out: Any = 0.0
        for i in range(3):
            for j in range(3):
                shifted = padded[:, i : i + height : step, j : j + width : step]
                out = out + shifted * self.kernel[i, j, 0]
        return out


class _Block(nnx.Module):
    """Half of the channels pass through; at stride 2 both branches halve all of them."""

    def __init__(self, in_features: int, features: int, rngs: nnx.Rngs):
        half, self.down = features // 2, in_features != features
        if self.down:
            left = [_Depthwise(in_features, 2, rngs), _Pointwise(in_features, half, rngs)]
            right = [_Pointwise(in_features, half, rngs), _Depthwise(half, 2, rngs)]
        else:
            left = []
            right = [_Pointwise(half, half, rngs), _Depthwise(half, 1, rngs)]
        for number, layer in enumerate([*left, *right, _Pointwise(half, half, rngs)], 1):
            setattr(self, f"conv{number}", layer)
            setattr(self, f"bn{number}", _norm(layer.kernel.shape[-1], rngs))

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def step(number: int, x: jax.Array, act: bool) -> jax.Array:
            convolved = getattr(self, f"conv{number}")(x)
            normed = getattr(self, f"bn{number}")(convolved, use_running_average=not train)
            return nnx.relu(normed) if act else normed

        if self.down:
            left, right = step(2, step(1, x, False), True), x
        else:
            left, right = jnp.split(x, 2, -1)
        first = 3 if self.down else 1
        right = step(first + 2, step(first + 1, step(first, right, True), False), True)
        # The shuffle: channels of the two halves alternate.
        return jnp.stack([left, right], -1).reshape(*left.shape[:-1], -1)


class ShuffleNetV2(nnx.Module):
    """Features of images: a 1x1 stem, stages of 4, 8 and 4 blocks, and 1,024 channels."""

    classifier_name = "linear"
    num_features = 1024

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv1, self.bn1 = _Pointwise(channels, 24, rngs), _norm(24, rngs)
        previous, stages = 24, []
        for features, blocks in ((116, 4), (232, 8), (464, 4)):
            widths = (previous, *(features,) * (blocks - 1))
            stages.append(nnx.List([_Block(width, features, rngs) for width in widths]))
            previous = features
        self.layer1, self.layer2, self.layer3 = stages
        self.conv2 = _Pointwise(previous, self.num_features, rngs)
        self.bn2 = _norm(self.num_features, rngs)

    def __call__(self, images: Any, *, train: bool = False) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(jnp.asarray(images)), use_running_average=not train))
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = block(x, train=train)
        x = nnx.relu(self.bn2(self.conv2(x), use_running_average=not train))
        return x.mean((1, 2))
