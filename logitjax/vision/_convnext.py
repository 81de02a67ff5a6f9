"""ConvNeXt and ConvNeXt V2."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.vision._layers import DepthwiseConv, Features, Images, conv, global_mean, layer_norm

# Epsilon of V2's normalisation of responses.
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig:
    """Blocks and channels of the stages, stride of the stem, V2's normalisation of responses."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    patch_size: int = 4
    response_norm: bool = False
    epsilon: float = 1e-6
    last_epsilon: float | None = None


class _Responses(nnx.Module):
    """Scaling of each channel by its norm over positions relative to the other channels'."""

    def __init__(self, width: int):
        # Initially the identity.
        self.scale, self.bias = nnx.Param(jnp.zeros(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        # float32, because many squares are summed.
        wide = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.square(wide).sum((1, 2), keepdims=True))
        relative = length / (length.mean(-1, keepdims=True) + _EPSILON)
        return (self.scale[...] * (wide * relative) + self.bias[...] + wide).astype(x.dtype)


class _Block(nnx.Module):
    def __init__(self, width: int, config: ConvNeXtConfig, *, dtype: Any, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.dwconv = DepthwiseConv(width, kernel=7, use_bias=True, **options)
        self.norm = layer_norm(width, config.epsilon, rngs)
        self.up = nnx.Linear(width, 4 * width, **options)
        self.grn: Any = _Responses(4 * width) if config.response_norm else None
        self.down = nnx.Linear(4 * width, width, **options)
        self.factor: Any = None if config.response_norm else nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = self.dwconv(x)
        inner = jax.nn.gelu(self.up(self.norm(inner).astype(inner.dtype)), approximate=False)
        inner = self.down(inner if self.grn is None else self.grn(inner))
        if self.factor is not None:
            inner = inner * self.factor[...].astype(inner.dtype)
        return x + inner


class _Stage(nnx.Module):
    def __init__(self, inside: int, width: int, depth: int, config: ConvNeXtConfig, **options: Any):
        halved: Any = {"stride": 2, "pad": 0, "use_bias": True, **options}
        self.norm: Any = layer_norm(inside, config.epsilon, options["rngs"]) if inside else None
        self.reduce: Any = conv(inside, width, 2, **halved) if inside else None
        self.blocks = nnx.List([_Block(width, config, **options) for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.reduce is not None:
            x = self.reduce(self.norm(x).astype(x.dtype))
        for block in self.blocks:
            x = block(x)
        return x


class ConvNeXt(nnx.Module):
    """ConvNeXt: a stem of patches, four stages of depthwise convolutions, the mean, a norm.

    Liu et al. (arXiv 2201.03545), Woo et al. (2301.00808). The names are this library's.
    """

    classifier_name = "fc"

    def __init__(self, config: ConvNeXtConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.num_features = config.widths[-1]
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        patch, first = config.patch_size, config.widths[0]
        self.patch = conv(3, first, patch, stride=patch, pad=0, use_bias=True, **options)
        self.patch_norm = layer_norm(first, config.epsilon, rngs)
        # The stem downsamples for the first stage.
        inside = [0, *config.widths[:-1]]
        self.stages = nnx.List(
            [
                _Stage(before, width, depth, config, **options)
                for before, width, depth in zip(inside, config.widths, config.depths)
            ]
        )
        last = config.epsilon if config.last_epsilon is None else config.last_epsilon
        self.norm = layer_norm(config.widths[-1], last, rngs)

    def __call__(self, images: Images, *, train: bool = False) -> Features:
        # Nothing here depends on the batch.
        del train
        x = self.patch(jnp.asarray(images, self.dtype))
        x = self.patch_norm(x).astype(x.dtype)
        for stage in self.stages:
            x = stage(x)
        return self.norm(global_mean(x))
