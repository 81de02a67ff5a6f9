"""Residual networks: the 6n + 2 family for small images and torchvision's for ImageNet."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.vision import _layers as layers
from logitjax.vision._layers import Features, Images, normed_conv


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut, projected if the shape changes (option B)."""

    def __init__(self, in_features: int, features: int, stride: int, options: dict[str, Any]):
        self.conv1, self.bn1 = normed_conv(in_features, features, 3, options, stride=stride)
        self.conv2, self.bn2 = normed_conv(features, features, 3, options)
        self.downsample = _shortcut(in_features, features, stride, options)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        running = not train
        out = nnx.relu(self.bn1(self.conv1(x), use_running_average=running))
        out = self.bn2(self.conv2(out), use_running_average=running)
        return _joined(x, out, self.downsample, running)


class Bottleneck(nnx.Module):
    """A 3x3 convolution with a quarter of the channels between two 1x1 ones, and a shortcut.

    The 3x3 one has the stride, as in torchvision, and more channels (`widen`) or `groups` of them.
    In CLIP they are `pooled`: averages replace strides.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        options: dict[str, Any],
        *,
        widen: int = 1,
        groups: int = 1,
        pooled: bool = False,
    ):
        self.pool = stride if pooled else 1
        narrow = features // 4 * widen
        self.conv1, self.bn1 = normed_conv(in_features, narrow, 1, options)
        # CLIP averages instead.
        step = 1 if pooled else stride
        self.conv2, self.bn2 = normed_conv(narrow, narrow, 3, options, stride=step, groups=groups)
        self.conv3, self.bn3 = normed_conv(narrow, features, 1, options)
        self.downsample = _shortcut(in_features, features, stride, options, pooled)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        running = not train
        out = nnx.relu(self.bn1(self.conv1(x), use_running_average=running))
        out = nnx.relu(self.bn2(self.conv2(out), use_running_average=running))
        out = self.bn3(self.conv3(layers.avg_pool(out, self.pool)), use_running_average=running)
        return _joined(layers.avg_pool(x, self.pool), out, self.downsample, running)


def _shortcut(
    in_features: int, features: int, stride: int, options: dict[str, Any], pooled: bool = False
) -> Any:
    """A projection and its norm if a block changes the shape, otherwise nothing."""
    if stride == 1 and in_features == features:
        return None
    step = 1 if pooled else stride
    return nnx.List(normed_conv(in_features, features, 1, options, stride=step))


def _joined(x: jax.Array, out: jax.Array, shortcut: Any, running: bool) -> jax.Array:
    if shortcut is not None:
        project, norm = shortcut
        x = norm(project(x), use_running_average=running)
    return nnx.relu(out + x)


def _stage(
    in_features: int,
    features: int,
    blocks: int,
    stride: int,
    options: dict[str, Any],
    block: Any = BasicBlock,
) -> Any:
    rest = (block(features, features, 1, options) for _ in range(blocks - 1))
    return nnx.List([block(in_features, features, stride, options), *rest])


def four_stages(
    inside: int, width: int, blocks: Sequence[int], options: dict[str, Any], block: Any
) -> list[Any]:
    """Stages with these numbers of blocks, each after the first twice as wide and half as large."""
    stages = []
    for number, count in enumerate(blocks):
        stages.append(_stage(inside, width << number, count, 1 + (number > 0), options, block))
        inside = width << number
    return stages


class CifarResNet(nnx.Module):
    """ResNet of depth 6n + 2 for images of about 32 pixels: three stages of n basic blocks.

    He et al. (arXiv 1512.03385), with 1x1 projections, and widths and names as in mdistiller.
    """

    classifier_name = "fc"

    def __init__(
        self,
        depth: int,
        widths: Sequence[int] = (16, 16, 32, 64),
        *,
        channels: int = 3,
        axis_name: str | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth: expected 6n + 2 (8, 14, 20, ...), got {depth}")
        options = {"axis_name": axis_name, "dtype": dtype, "rngs": rngs}
        self.num_features = widths[3]
        self.conv1, self.bn1 = normed_conv(channels, widths[0], 3, options)
        self.layer1 = _stage(widths[0], widths[1], blocks, 1, options)
        self.layer2 = _stage(widths[1], widths[2], blocks, 2, options)
        self.layer3 = _stage(widths[2], widths[3], blocks, 2, options)

    def __call__(self, images: Images, *, train: bool = False) -> Features:
        x = nnx.relu(self.bn1(self.conv1(jnp.asarray(images)), use_running_average=not train))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = block(x, train=train)
        return layers.global_mean(x)


class ResNet(nnx.Module):
    """torchvision's ResNet: 7x7 stem of stride 2, max-pooling, four stages.

    (2, 2, 2, 2) blocks are ResNet-18, (3, 4, 6, 3) ResNet-34 or, with bottlenecks, ResNet-50; with
    `widen` 2 and 32 `groups` ResNeXt-50 32x4d. The small stem, 3x3 without stride or pooling, is
    that of the released dual-head code's ImageNet student.
    """

    classifier_name = "fc"

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        channels: int = 3,
        bottleneck: bool = False,
        widen: int = 1,
        groups: int = 1,
        small_stem: bool = False,
        axis_name: str | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        options = {"axis_name": axis_name, "dtype": dtype, "rngs": rngs}
        block: Any = BasicBlock
        if bottleneck:
            block = functools.partial(Bottleneck, widen=widen, groups=groups)
        # Factor by which a bottleneck widens its output.
        more = 4 if bottleneck else 1
        self.num_features, self.small_stem = 512 * more, small_stem
        kernel, stride = (3, 1) if small_stem else (7, 2)
        self.conv1, self.bn1 = normed_conv(channels, 64, kernel, options, stride=stride)
        self.layer1, self.layer2, self.layer3, self.layer4 = four_stages(
            64, 64 * more, blocks, options, block
        )

    def __call__(self, images: Images, *, train: bool = False) -> Features:
        x = nnx.relu(self.bn1(self.conv1(jnp.asarray(images)), use_running_average=not train))
        if not self.small_stem:
            x = layers.max_pool(x, 3, 2, pad=1)
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            x = block(x, train=train)
        return layers.global_mean(x)
