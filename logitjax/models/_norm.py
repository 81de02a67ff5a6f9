"""RMS and layer norms with the scale offset that Gemma checkpoints carry."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.models._config import DecoderConfig


class Norm(nnx.Module):
    """`x / rms(x) * (offset + scale)` or the usual layer norm, in float32."""

    def __init__(
        self, config: DecoderConfig, size: int, *, param_dtype: Any, rms: bool | None = None
    ):
        self.rms = config.norm == "rms" if rms is None else rms
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        self.scale = nnx.Param(jnp.full((size,), 1.0 - self.offset, param_dtype))
        if not self.rms:
            self.bias = nnx.Param(jnp.zeros((size,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = jnp.asarray(x, jnp.float32)
        if not self.rms:
            wide -= wide.mean(axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        wide *= self.offset + self.scale[...].astype(jnp.float32)
        if not self.rms:
            wide += self.bias[...].astype(jnp.float32)
        return wide.astype(x.dtype)
