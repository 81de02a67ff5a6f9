"""VGG with batch normalisation, in the form used on small images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.vision._layers import batch_norm, conv, global_mean, max_pool

CONFIGS: dict[int, tuple[tuple[int, ...], ...]] = {
    8: ((64,), (128,), (256,), (512,), (512,)),
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nnx.Module):
    """Five groups of 3x3 convolutions and one linear layer.

    Three max-poolings follow the first three groups; a fourth follows at 64 pixels or more.

    Args:
      depth: 8, 11, 13, 16 or 19.
      channels: number of channels of the images.
      axis_name: mesh axis of the batch inside ``shard_map`` or ``pmap``; not needed under ``jit``.
      dtype: type of the computation; parameters stay float32.
      rngs: needs ``params``.

    Raises:
      ValueError: an unknown depth.

    References:
      Simonyan and Zisserman (arXiv 1409.1556); the small-image form and names as in mdistiller.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        depth: int,
        *,
        channels: int = 3,
        axis_name: str | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if depth not in CONFIGS:
            raise ValueError(f"depth: expected one of {sorted(CONFIGS)}, got {depth}")
        options = {"axis_name": axis_name, "dtype": dtype, "rngs": rngs}
        self.num_features = 512
        previous = channels

        def group(widths: Sequence[int]) -> Any:
            nonlocal previous
            layers = {}
            for i, width in enumerate(widths):
                # Numbered as torch counts them: convolution, norm, activation.
                layers[str(3 * i)] = conv(previous, width, 3, use_bias=True, dtype=dtype, rngs=rngs)
                layers[str(3 * i + 1)] = batch_norm(width, **options)
                previous = width
            return nnx.Dict(layers)

        groups = [group(widths) for widths in CONFIGS[depth]]
        self.block0, self.block1, self.block2, self.block3, self.block4 = groups

    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> Float[jax.Array, "batch features"]:
        x = jnp.asarray(images)
        groups = (self.block0, self.block1, self.block2, self.block3, self.block4)
        for number, group in enumerate(groups):
            for i in range(len(group) // 2):
                x = group[str(3 * i)](x)
                x = group[str(3 * i + 1)](x, use_running_average=not train)
                x = nnx.relu(x)
            if number < 3 or (number == 3 and images.shape[1] >= 64):
                x = max_pool(x, 2, 2)
        return global_mean(x)
