"""Classifiers of a backbone and a head, by their names in the literature."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float

from logitjax.heads import torch_linear
from logitjax.ops import Array
from logitjax.storage.weights import read_state_dict
from logitjax.vision._packaged import EfficientNetLite0
from logitjax.vision._resnet import CifarResNet, ResNet
from logitjax.vision._torch_layout import fill_weights, torch_names

# mdistiller's `x4`.
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
    """A backbone, which maps images to features, and a head, which maps features to logits.

    Args:
        backbone: a module ``(inputs, train=) -> [batch, num_features]``; inputs are often images.
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
        """Return logits; ``train=True`` uses batch statistics, which update the running ones."""
        return self.head(self.features(inputs, train=train))

    @classmethod
    def create(
        cls,
        name: str,
        num_classes: int = 100,
        *,
        channels: int = 3,
        head: Callable[..., nnx.Module] | None = None,
        axis_name: str | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> "ImageClassifier":
        """Create a network of the literature by name.

        Args:
            name: ``resnet20``, ``resnet32x4``, ``imagenet_resnet18``, ``efficientnet_lite0``, ...;
                others are a ValueError.
            head: creates the head, called as ``head(num_features, num_classes, rngs=rngs)``; by
                default a linear layer. For other options see `logitjax.vision`.

        >>> def logits(images):
        ...     return ImageClassifier.create("resnet8", 10, rngs=nnx.Rngs(0))(images)
        >>> jax.eval_shape(logits, jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")).shape
        (2, 10)
        """
        if name not in _MODELS:
            raise ValueError(f"name: expected one of {', '.join(sorted(_MODELS))}, got {name!r}")
        backbone = _MODELS[name](channels=channels, axis_name=axis_name, dtype=dtype, rngs=rngs)
        make_head = torch_linear if head is None else head
        return cls(backbone, make_head(backbone.num_features, num_classes, rngs=rngs))

    def load(self, weights: epath.PathLike | Mapping[str, np.ndarray]) -> None:
        """Load the weights of a torch checkpoint, without torch.

        Files in the layout of torchvision (ResNets) and mdistiller (the small-image networks) fit
        the networks of the same names: ``.safetensors``, or ``.pth``/``.pt``/``.tar`` read through
        an allow-list. A checkpoint may hold the weights under ``model`` or ``state_dict`` and may
        carry the ``module.`` prefix of data-parallel training.

        Args:
            weights: a file, or the arrays by their torch names; ValueError if some are missing,
                unknown or of another shape, or if the file is not safe to read.
        """
        arrays = dict(weights) if isinstance(weights, Mapping) else read_state_dict(weights)
        fill_weights(self, arrays, torch_names(self))
