"""Rotary position embedding, in the half-split layout of Hugging Face checkpoints."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from logitjax.models._config import DecoderConfig, RopeScaling, Window
from logitjax.ops import Array


def _yarn(inverse: np.ndarray, scaling: RopeScaling, dim: int, theta: float) -> np.ndarray:
    def dimension(turns: float) -> float:
        period = scaling.original_max_length / (turns * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return inverse * (1 - ramp) + inverse / scaling.factor * ramp


def _llama3(inverse: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    turns = scaling.original_max_length * inverse / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


def rope_frequencies(
    config: DecoderConfig, window: Window, length: int
) -> tuple[np.ndarray, float]:
    """Angular frequency of each rotated pair, and the factor on cos and sin.

    ``length`` is the longest sequence that will be seen; only ``'longrope'`` depends on it.
    """
    local = window is not None and config.rope_local_theta is not None
    theta = config.rope_local_theta if local else config.rope_theta
    base = float(theta if theta is not None else config.rope_theta)
    dim = config.rope_dim
    inverse = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = None if local else config.rope_scaling
    if scaling is None:
        return inverse, 1.0
    if scaling.kind == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inverse, scaling), 1.0
    if scaling.kind == "yarn":
        factor = scaling.attention_factor
        return _yarn(inverse, scaling, dim, base), (
            0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor
        )
    if scaling.kind == "factors":
        return inverse / np.asarray(scaling.short_factors), 1.0
    long = length > scaling.original_max_length
    factors = np.asarray(scaling.long_factors if long else scaling.short_factors)
    if scaling.attention_factor is not None:
        amplitude = scaling.attention_factor
    elif scaling.factor <= 1.0:
        amplitude = 1.0
    else:
        amplitude = math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_length))
    return inverse / factors, amplitude


def rope_tables(
    config: DecoderConfig,
    window: Window,
    positions: Int[Array, "batch time"],
    length: int,
) -> tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]]:
    """cos and sin of position times frequency, float32."""
    inverse, amplitude = rope_frequencies(config, window, length)
    angles = jnp.maximum(positions, 0)[..., None].astype(jnp.float32) * jnp.asarray(
        inverse, jnp.float32
    )
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def apply_rope(
    x: Float[Array, "batch time heads dim"],
    tables: tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]],
) -> Float[jax.Array, "batch time heads dim"]:
    """Rotate pairs ``(i, i + half)`` of the first ``2 half`` entries; the rest passes through."""
    cos, sin = (t[:, :, None, :] for t in tables)
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second = wide[..., :half], wide[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin, wide[..., 2 * half :]]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
