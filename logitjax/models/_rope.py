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
        # The pair that makes this many turns over the trained length.
        return dim * math.log(period) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # Pairs that turn often keep their frequency, those that hardly turn are stretched fully.
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    return inverse * (1 - ramp) + inverse / scaling.factor * ramp


def _scaling(config: DecoderConfig, window: Window) -> RopeScaling | None:
    """Layers with a base of their own are not stretched."""
    local = window is not None and config.rope_local_theta is not None
    return None if local else config.rope_scaling


def changes_with_length(config: DecoderConfig, window: Window, bound: int | None) -> bool:
    """Whether frequencies depend on the length of a sequence; `bound`: the maximum length."""
    scaling = _scaling(config, window)
    if scaling is None or scaling.short_factors == scaling.long_factors:
        return False
    return bound is None or bound > scaling.original_max_length


def rope_frequencies(
    config: DecoderConfig, window: Window, *, long: bool = False
) -> tuple[np.ndarray, float]:
    """Angular frequency of each rotated pair, and the factor on cos and sin; `long`: longrope."""
    scaling = _scaling(config, window)
    base = config.rope_theta
    if scaling is None and window is not None and config.rope_local_theta is not None:
        base = config.rope_local_theta
    dim = config.rope_dim
    inverse = float(base) ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is None:
        return inverse, 1.0
    if scaling.kind == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.kind == "llama3":
        # Over the trained length.
        turns = scaling.original_max_length * inverse / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - smooth) * inverse / scaling.factor + smooth * inverse, 1.0
    amplitude = scaling.attention_factor
    if scaling.kind == "yarn":
        # YaRN's sqrt(1 / t): it sharpens attention over longer texts.
        if amplitude is None:
            amplitude = 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0
        return _yarn(inverse, scaling, dim, base), amplitude
    factors = np.asarray(scaling.long_factors if long else scaling.short_factors)
    if amplitude is None and scaling.factor <= 1.0:
        amplitude = 1.0
    # LongRoPE's own rule, if the checkpoint states none.
    elif amplitude is None:
        amplitude = math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_length))
    return inverse / factors, amplitude


def rope_tables(
    config: DecoderConfig,
    window: Window,
    positions: Int[Array, "batch time"],
    lengths: Int[Array, "batch"] | None = None,
) -> tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]]:
    """float32 cos and sin of position times frequency; by `lengths`, if `changes_with_length`."""
    inverse, amplitude = rope_frequencies(config, window)
    inverse = jnp.asarray(inverse, jnp.float32)
    scaling = _scaling(config, window)
    if lengths is not None and scaling is not None:
        long = jnp.asarray(rope_frequencies(config, window, long=True)[0], jnp.float32)
        beyond = (jnp.asarray(lengths) > scaling.original_max_length)[:, None, None]
        inverse = jnp.where(beyond, long, inverse)
    angles = jnp.maximum(positions, 0)[..., None].astype(jnp.float32) * inverse  # -1 pads
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def apply_rope(
    x: Float[Array, "batch time_or_heads heads_or_time dim"],
    tables: tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]],
    *,
    heads_axis: int = 2,
) -> Float[jax.Array, "batch time_or_heads heads_or_time dim"]:
    """Rotate pairs `(i, i + half)` of the first `2 half` entries; the rest is unchanged."""
    cos, sin = (jnp.expand_dims(t, heads_axis) for t in tables)
    half = cos.shape[-1]
    # Sums of products, which bfloat16 would round three times.
    wide = x.astype(jnp.float32)
    first, second = wide[..., :half], wide[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin, wide[..., 2 * half :]]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
