"""Layers shared by the image classifiers: torch's convolutions and batch normalisation."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from logitjax.ops import Array
from logitjax.ops import mesh as on_mesh

Images = Float[Array, "batch height width channels"]
Features = Float[jax.Array, "batch features"]

# He's initialisation by fan-out, as in all these networks.
_he_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def _convolve(
    images: jax.Array, kernel: jax.Array, strides: Any, *args: Any, **options: Any
) -> jax.Array:
    """Convolve with XLA, which needs the result's sharding on meshes with Explicit axes."""
    if kernel.shape[:2] == (1, 1) and set(strides) == {1}:
        # On CPUs the plain product is up to ten times faster than XLA's convolution.
        return jnp.matmul(images, kernel[0, 0], precision=options.get("precision"))

    def convolve(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array]:
        return (jax.lax.conv_general_dilated(images, kernel, strides, *args, **options),)

    return on_mesh.over_batch(convolve, (images.ndim,), images, kernel)[0]


def conv(
    in_features: int,
    out_features: int,
    kernel: int,
    *,
    stride: int = 1,
    pad: int | None = None,
    same: bool = False,
    use_bias: bool = False,
    groups: int = 1,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Convolution padded by `(kernel - 1) // 2` as in torch, by `pad`, or TensorFlow's `same`."""
    side = (kernel - 1) // 2 if pad is None else pad
    return nnx.Conv(
        in_features,
        out_features,
        (kernel, kernel),
        strides=stride,
        padding="SAME" if same else [(side, side), (side, side)],
        use_bias=use_bias,
        feature_group_count=groups,
        kernel_init=_he_fan_out,
        dtype=dtype,
        conv_general_dilated=_convolve,
        rngs=rngs,
    )


class DepthwiseConv(nnx.Module):
    """Convolution with one or several filters per channel, as shifted multiplications."""

    # XLA's grouped convolution is slower on CPUs.

    def __init__(
        self,
        features: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        same: bool = False,
        use_bias: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.stride, self.same, self.dtype = stride, same, dtype
        # torch counts fan-out over all channels although a filter feeds only one.
        std = math.sqrt(2.0 / (kernel * kernel * features))
        shape = (kernel, kernel, 1, features)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape))
        self.bias: Any = nnx.Param(jnp.zeros(features)) if use_bias else None

    def __call__(self, x: Float[Array, "batch height width features"]) -> jax.Array:
        x = jnp.asarray(x, self.dtype)
        kernel = jnp.asarray(self.kernel[...], x.dtype)
        size, step = kernel.shape[0], self.stride
        if kernel.shape[-1] > x.shape[-1]:
            # Filters of a channel are adjacent.
            x = jnp.repeat(x, kernel.shape[-1] // x.shape[-1], -1)
        height, width = ((n - 1) // step + 1 for n in x.shape[1:3])  # rounded up

        def padding(length: int, outputs: int) -> tuple[int, int]:
            if not self.same:
                return (size // 2, size // 2)
            total = max((outputs - 1) * step + size - length, 0)
            return total // 2, total - total // 2

        sides = padding(x.shape[1], height), padding(x.shape[2], width)
        padded = jnp.pad(x, ((0, 0), *sides, (0, 0)))
        out = 0.0 if self.bias is None else self.bias[...].astype(x.dtype)
        for i in range(size):
            for j in range(size):
                rows = slice(i, i + step * (height - 1) + 1, step)
                columns = slice(j, j + step * (width - 1) + 1, step)
                out = out + padded[:, rows, columns] * kernel[i, j, 0]
        return jnp.asarray(out)


# Over the global batch: directly under `jit`, otherwise over `axis_name`. Torch's momentum, 0.1, is
# the share of the new value.
batch_norm = functools.partial(nnx.BatchNorm, momentum=0.9)


def normed_conv(
    in_features: int, out_features: int, kernel: int, options: dict[str, Any], **geometry: Any
) -> tuple[nnx.Conv, nnx.BatchNorm]:
    """A convolution without a bias, and its batch norm, which takes all of the options."""
    shared = {key: options[key] for key in ("dtype", "rngs")}
    convolution = conv(in_features, out_features, kernel, **geometry, **shared)
    return convolution, batch_norm(out_features, **options)


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm computed in float32, whatever the type of the network."""
    # E[x^2] - E[x]^2 suffers from cancellation.
    options: dict[str, Any] = {"use_fast_variance": False, "dtype": jnp.float32}
    return nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs, **options)


def max_pool(x: jax.Array, size: int, stride: int, pad: int = 0) -> jax.Array:
    padding: Any = ((pad, pad), (pad, pad))
    return nnx.max_pool(x, (size, size), strides=(stride, stride), padding=padding)


def avg_pool(x: jax.Array, size: int) -> jax.Array:
    return nnx.avg_pool(x, (size, size), strides=(size, size)) if size > 1 else x


def global_mean(x: Float[Array, "batch height width features"]) -> jax.Array:
    """Mean over all positions, in float32."""
    if x.dtype != jnp.float32:
        # jaxlib 0.12 on CPUs wrongly fuses a sum of two bfloat16 convolutions into this mean: NaN.
        x = jax.lax.optimization_barrier(x)
    return jnp.asarray(x, jnp.float32).mean((1, 2))
