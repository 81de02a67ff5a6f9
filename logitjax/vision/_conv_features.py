"""The convolutional parts of AlexNet and VGG-16: features learned on ImageNet."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from logitjax.vision._layers import Features, Images, conv, global_mean, max_pool

# (channels, kernel, stride, padding), or the kernel of a max-pooling of stride 2.
_ALEXNET = ((64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), 3)
_VGG16 = tuple(
    layer
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    for layer in ((width, 3, 1, 1),) * count + (2,)
)


class ConvFeatures(nnx.Module):
    """Convolutions with biases and ReLUs, max-poolings, and the mean over all positions.

    ``features`` is numbered like torchvision's ``features``. Pictures of any size work that leave
    something to pool: 63 pixels for AlexNet, 32 for VGG-16.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, int, int, int] | int],
        *,
        channels: int = 3,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        modules: dict[str, Any] = {}
        order: list[tuple[str, int]] = []
        number, previous = 0, channels
        for layer in layers:
            if isinstance(layer, int):
                order.append(("", layer))
                number += 1
                continue
            width, kernel, stride, pad = layer
            modules[str(number)] = conv(
                previous,
                width,
                kernel,
                stride=stride,
                pad=pad,
                use_bias=True,
                dtype=dtype,
                rngs=rngs,
            )
            order.append((str(number), 0))
            # The ReLU has a number too.
            number, previous = number + 2, width
        self.features: Any = nnx.Dict(modules)
        self.order, self.num_features = tuple(order), previous

    def __call__(self, images: Images, *, train: bool = False) -> Features:
        # Nothing here differs.
        del train
        x = jnp.asarray(images)
        for name, pool in self.order:
            x = max_pool(x, pool, 2) if pool else nnx.relu(self.features[name](x))
        return global_mean(x)


def alexnet_features(**options: Any) -> ConvFeatures:
    """torchvision's AlexNet up to its last pooling: 256 features. Options as for `ConvFeatures`."""
    return ConvFeatures(_ALEXNET, **options)


def vgg16_features(**options: Any) -> ConvFeatures:
    """torchvision's VGG-16 up to its last pooling: 512 features. Options as for `ConvFeatures`."""
    return ConvFeatures(_VGG16, **options)
