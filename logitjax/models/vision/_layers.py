"""What the image classifiers share: convolutions and batch normalisation as torch defines them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from logitjax.ops import Array, over_batch

# He's initialisation over the outputs, as all these networks use it.
_he_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def _convolve(images: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """XLA's convolution, which on meshes with Explicit axes asks where its result lies."""

    def convolve(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array]:
        return (jax.lax.conv_general_dilated(images, kernel, *args, **options),)

    return over_batch(convolve, (images.ndim,), images, kernel)[0]


def conv(
    in_features: int,
    out_features: int,
    kernel: int,
    *,
    stride: int = 1,
    use_bias: bool = False,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution with torch's symmetric padding (``SAME`` differs from it at stride 2)."""
    pad = (kernel - 1) // 2
    return nnx.Conv(
        in_features,
        out_features,
        (kernel, kernel),
        strides=stride,
        padding=[(pad, pad), (pad, pad)],
        use_bias=use_bias,
        kernel_init=_he_fan_out,
        dtype=dtype,
        conv_general_dilated=_convolve,
        rngs=rngs,
    )


class DepthwiseConv(nnx.Module):
    """One 3x3 filter a channel, as nine shifted multiplications.

    XLA's grouped convolution is several times slower on CPUs, and this fuses elsewhere.
    """

    def __init__(self, features: int, *, stride: int = 1, dtype: Any = None, rngs: nnx.Rngs):
        self.stride, self.dtype = stride, dtype
        # torch counts fan-out over all channels although a filter feeds only one.
        std = math.sqrt(2.0 / (9 * features))
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (3, 3, 1, features)))

    def __call__(self, x: Float[Array, "batch height width features"]) -> jax.Array:
        x = jnp.asarray(x, self.dtype)
        kernel = jnp.asarray(self.kernel[...], x.dtype)
        step = self.stride
        height, width = ((n - 1) // step + 1 for n in x.shape[1:3])
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        out = 0.0
        for i in range(3):
            for j in range(3):
                rows = slice(i, i + step * (height - 1) + 1, step)
                columns = slice(j, j + step * (width - 1) + 1, step)
                out = out + padded[:, rows, columns] * kernel[i, j, 0]
        return jnp.asarray(out)


def batch_norm(
    features: int, *, axis_name: str | None = None, dtype: Any = None, rngs: nnx.Rngs
) -> nnx.BatchNorm:
    """Batch statistics of the global batch: under ``jit`` by themselves, else over ``axis_name``.

    The running variance takes in the biased estimate, where torch's takes the unbiased one.
    """
    return nnx.BatchNorm(
        features, momentum=0.9, epsilon=1e-5, axis_name=axis_name, dtype=dtype, rngs=rngs
    )


def max_pool(x: jax.Array, size: int, stride: int, pad: int = 0) -> jax.Array:
    padding: Any = ((pad, pad), (pad, pad))
    return nnx.max_pool(x, (size, size), strides=(stride, stride), padding=padding)


def global_mean(x: Float[Array, "batch height width features"]) -> jax.Array:
    """Mean over all positions, in float32."""
    return jnp.asarray(x, jnp.float32).mean((1, 2))
