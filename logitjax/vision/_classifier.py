"""A backbone and a head, and the names under which the literature knows them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Float

from logitjax.heads import torch_linear
from logitjax.ops import Array
from logitjax.vision._efficientnet import EfficientNetLite0
from logitjax.vision._resnet import CifarResNet, ResNet

_X4 = (32, 64, 128, 256)

_MODELS: dict[str, Callable[..., Any]] = {
    **{f"resnet{depth}": functools.partial(CifarResNet, depth) for depth in (8, 14, 20, 32)},
    **{f"resnet{depth}": functools.partial(CifarResNet, depth) for depth in (44, 56, 110)},
    **{f"resnet{depth}x4": functools.partial(CifarResNet, depth, _X4) for depth in (8, 32)},
    "imagenet_resnet18": functools.partial(ResNet, (2, 2, 2, 2)),
    "imagenet_resnet34": functools.partial(ResNet, (3, 4, 6, 3)),
    "imagenet_resnet50": functools.partial(ResNet, (3, 4, 6, 3), bottleneck=True),
    "efficientnet_lite0": EfficientNetLite0,
    "resnet18_small_stem": functools.partial(ResNet, (2, 2, 2, 2), small_stem=True),
}


class ImageClassifier(nnx.Module):
    """A backbone, which makes features of images, and a head, which makes logits of features.

    Args:
        backbone: a module ``(inputs, train=) -> [batch, num_features]``; of images or anything
            else.
        head: a module ``features -> logits``: ``nnx.Linear``, `distillation.DualHead`, ...
    """

    def __init__(self, backbone: nnx.Module, head: nnx.Module):
        self.backbone: Any = backbone
        self.head: Any = head

    def features(
        self, inputs: Float[Array, "batch ..."], *, train: bool = False
    ) -> Float[jax.Array, "batch features"]:
        return self.backbone(inputs, train=train)

    def __call__(
        self, inputs: Float[Array, "batch ..."], *, train: bool = False
    ) -> Float[jax.Array, "batch classes"]:
        """Logits; with ``train=True`` from batch statistics, which update the running ones."""
        return self.head(self.features(inputs, train=train))


def create_classifier(
    name: str,
    num_classes: int = 100,
    *,
    channels: int = 3,
    head: Callable[..., nnx.Module] | None = None,
    axis_name: str | None = None,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> ImageClassifier:
    """A network of the literature by its name.

    Args:
        name: such as ``resnet20``, ``resnet32x4``, ``imagenet_resnet18`` or ``efficientnet_lite0``.
        num_classes: number of classes of the head.
        channels: number of channels of the images.
        head: makes the head, called as ``head(num_features, num_classes, rngs=rngs)``; a linear
            layer when omitted.
        axis_name: mesh axis of the batch inside ``shard_map`` or ``pmap``; not needed under
            ``jit``.
        dtype: type of the backbone's computation.
        rngs: needs ``params``.

    Returns:
        The classifier.

    Raises:
        ValueError: an unknown name.

    >>> def logits(images):
    ...     return create_classifier("resnet8", 10, rngs=nnx.Rngs(0))(images)
    >>> jax.eval_shape(logits, jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")).shape
    (2, 10)
    """
    if name not in _MODELS:
        raise ValueError(f"name: expected one of {', '.join(sorted(_MODELS))}, got {name!r}")
    backbone = _MODELS[name](channels=channels, axis_name=axis_name, dtype=dtype, rngs=rngs)
    make_head = torch_linear if head is None else head
    return ImageClassifier(backbone, make_head(backbone.num_features, num_classes, rngs=rngs))
