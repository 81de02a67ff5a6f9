"""Attention of one layer, with everything that layers of one kind share computed once."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from logitjax.models import _cache as caching
from logitjax.models._blocked_attention import blocked_attention
from logitjax.models._cache import Cache
from logitjax.models._config import DecoderConfig, Kind, Window
from logitjax.models._lora import linear_map, project
from logitjax.models._rope import apply_rope, changes_with_length, rope_tables
from logitjax.ops import Array, sharding
from logitjax.ops import mesh as on_mesh

Implementation = Literal["xla", "cudnn", "blocked"] | None
# Tokens in a row from which scores are formed in blocks: 64 MiB per head otherwise.
LONG = 4096


@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """Values shared by all layers of one kind: rotations, mask and cache slots."""

    window: Window
    tables: Any
    # For caches that store keys unrotated because their rotation changes with the length.
    key_tables: Any
    mask: Any
    slots: Any
    concatenate: bool
    implementation: Implementation
    lora_rows: Any
    segments: Any = None


def make_context(
    config: DecoderConfig,
    kind: Kind,
    positions: Int[Array, "batch time"],
    *,
    segment_ids: Int[Array, "batch time"] | None,
    padded: bool,
    cache: Cache | None,
    implementation: Implementation,
    lora_rows: Array | None,
) -> tuple[AttentionContext, jax.Array | None]:
    """The context of one kind of layer, and the positions its cache will hold."""
    time, (window, rotates) = positions.shape[1], kind
    slots = stored = mask = segments = None
    concatenate = False
    lengths = seen = None
    if cache is not None:
        before = cache.positions[caching.kind_name(window)]
        size = before.shape[1]
        if window is None and time > size:
            raise ValueError(f"tokens: {time} new tokens do not fit a cache of {size} slots")
        slots = caching.write_slots(positions, size, window)
        rows = jnp.arange(len(before))[:, None]
        stored = jnp.asarray(before).at[rows, slots].set(positions, mode="drop")
        # Elsewhere new tokens overwrite nothing that the first of them still sees.
        concatenate = window is not None and time > 1 and size < window + time - 1
        seen = stored
        if concatenate:
            # The ring as it was, then the new tokens: [batch, slots + time].
            new = jnp.asarray(positions)
            first = jnp.where(new < 0, jnp.iinfo(new.dtype).max, new).min(axis=1, keepdims=True)
            # Positions that are written again are seen once, with their new values.
            seen = jnp.concatenate([jnp.where(before < first, before, -1), new], axis=1)
        mask = caching.position_mask(positions, seen, window)
    elif implementation == "blocked" or (implementation is None and time >= LONG):
        # No mask is formed: for 32,768 tokens it would be as large as the scores.
        segments = jnp.zeros(positions.shape, jnp.int32) if segment_ids is None else segment_ids
        segments = jnp.where(positions >= 0, segments, -1) if padded else segments
    elif segment_ids is not None or padded:
        mask = _packed_mask(positions, segment_ids, window, padded)
    tables = key_tables = None
    if config.position == "rope" and rotates:
        if changes_with_length(config, window, _longest(cache)):
            lengths = jnp.asarray(positions).max(axis=1) + 1
        tables = rope_tables(config, window, positions, lengths)
        if seen is not None and lengths is not None:
            key_tables = rope_tables(config, window, seen, lengths)
    context = AttentionContext(
        window=window,
        tables=tables,
        key_tables=key_tables,
        mask=mask,
        slots=slots,
        concatenate=concatenate,
        implementation=implementation,
        lora_rows=lora_rows,
        segments=segments,
    )
    return context, stored


def _longest(cache: Cache | None) -> int | None:
    """Maximum sequence length of a cache; a window's ring sets none."""
    stored = None if cache is None else cache.positions.get(caching.kind_name(None))
    return None if stored is None else stored.shape[1]


def _packed_mask(
    positions: Array, segment_ids: Array | None, window: Window, padded: bool
) -> Bool[jax.Array, "batch 1 time time"]:
    index = jnp.arange(positions.shape[1])
    # By index in the row, not by position, which restarts in each document.
    mask = (index[:, None] >= index[None, :])[None]
    if window is not None:
        mask &= (index[:, None] - index[None, :] < window)[None]
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    if padded:
        mask &= (positions >= 0)[:, None, :]
    return jnp.broadcast_to(mask, (positions.shape[0], *mask.shape[1:]))[:, None]


def attend(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch time kv_heads dim"],
    value: Float[Array, "batch time kv_heads dim"],
    context: AttentionContext,
    *,
    scale: float,
    softcap: float | None,
) -> Float[jax.Array, "batch time heads dim"]:
    """Attention within a sequence, with separate paths for long ones and soft-capped logits."""
    if context.segments is not None:
        return _attend_in_blocks(query, key, value, context, scale=scale, softcap=softcap)
    causal = context.mask is None
    if softcap is None:
        window = None if context.window is None or not causal else (context.window - 1, 0)
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=context.mask,
            scale=scale,
            is_causal=causal,
            local_window_size=window,
            implementation=None if context.implementation == "blocked" else context.implementation,
        )
    mask = context.mask
    if mask is None:
        index = jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2])
        mask = caching.position_mask(index, index, context.window)
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    return attend_heads_first(query, key, value, mask, scale=scale, softcap=softcap)


def _attend_in_blocks(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch time kv_heads dim"],
    value: Float[Array, "batch time kv_heads dim"],
    context: AttentionContext,
    **options: Any,
) -> Float[jax.Array, "batch time heads dim"]:
    """Blocked attention; if the mesh splits the time, each device has a part of the queries."""
    # Keys and values are gathered, a few megabytes per layer, and the scores stay in parts. On a
    # TPU with whole rows the splash attention kernel forms the blocks.
    options["window"] = context.window
    axes = on_mesh.auto_axes(sharding.MeshAxes.current().sequence, query.shape[1])
    # Without a known mesh, its operands may be on several devices.
    has_mesh = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
    whole_rows = not axes and has_mesh and context.implementation is None
    if whole_rows and on_mesh.platform_of(query) == "tpu":
        # Pallas takes a second to import.
        from logitjax.models._splash_attention import splash_attention

        return splash_attention(query, key, value, context.segments, **options)
    if not axes:
        return blocked_attention(query, key, value, context.segments, context.segments, **options)

    def part(query: Any, key: Any, value: Any, segments: Any) -> jax.Array:
        gather = functools.partial(jax.lax.all_gather, axis_name=axes, axis=1, tiled=True)
        start = jax.lax.axis_index(axes) * query.shape[1]
        keys = (gather(key), gather(value))
        return blocked_attention(query, *keys, segments, gather(segments), start, **options)

    spec = PartitionSpec(None, axes)
    return jax.shard_map(
        part, in_specs=(spec,) * 4, out_specs=spec, axis_names=set(axes), check_vma=False
    )(query, key, value, context.segments)


def attend_heads_first(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch kv_heads slots dim"],
    value: Float[Array, "batch kv_heads slots dim"],
    mask: Bool[Array, "batch 1 time slots"],
    *,
    scale: float,
    softcap: float | None,
) -> Float[jax.Array, "batch time heads dim"]:
    """Attention over keys and values in a cache's layout."""
    batch, time, heads, dim = query.shape
    groups = key.shape[1]
    # Query heads of one key head become rows of one matmul.
    query = jnp.swapaxes(query, 1, 2).reshape(batch, groups, heads // groups * time, dim)
    logits = jnp.einsum("bgqd,bgsd->bgqs", query, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits.reshape(batch, heads, time, -1)
    # Not -inf: a row of padding sees no key, and its softmax would be nan.
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, groups, heads // groups * time, -1)
    out = jnp.einsum("bgqs,bgsd->bgqd", weights, value)
    return jnp.swapaxes(out.reshape(batch, heads, time, dim), 1, 2)


class Norm(nnx.Module):
    """`x / rms(x) * (offset + scale)` or the usual layer norm, in float32."""

    def __init__(
        self,
        config: DecoderConfig,
        size: int,
        *,
        param_dtype: Any,
        rms: bool | None = None,
        divisor: float = 1.0,
    ):
        self.rms = config.norm == "rms" if rms is None else rms
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        self.divisor = divisor
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
        if self.divisor != 1.0:
            wide /= self.divisor
        return wide.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with optional biases and query/key norms."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        linear = functools.partial(linear_map, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = config
        inner = config.num_heads * config.head_dim
        narrow = config.num_kv_heads * config.head_dim
        self.query = linear(config.hidden_size, inner, use_bias=config.qkv_bias)
        self.key = linear(config.hidden_size, narrow, use_bias=config.qkv_bias)
        self.value = linear(config.hidden_size, narrow, use_bias=config.qkv_bias)
        self.output = linear(inner, config.hidden_size, use_bias=config.output_bias)
        if config.qk_norm:
            sizes = (inner, narrow) if config.qk_norm_joint else (config.head_dim,) * 2
            self.query_norm, self.key_norm = (
                Norm(config, size, param_dtype=param_dtype, rms=True) for size in sizes
            )

    def __call__(self, x: jax.Array, context: AttentionContext, cache: Any, lora: Any):
        config = self.config
        batch, time, _ = x.shape
        rows = context.lora_rows
        query = project(self.query, x, lora, "query", rows)
        key = project(self.key, x, lora, "key", rows)
        value = project(self.value, x, lora, "value", rows)
        joint = config.qk_norm_joint
        if joint:
            query, key = self.query_norm(query), self.key_norm(key)
        query = query.reshape(batch, time, config.num_heads, config.head_dim)
        key = key.reshape(batch, time, config.num_kv_heads, config.head_dim)
        value = value.reshape(batch, time, config.num_kv_heads, config.head_dim)
        if config.qk_norm and not joint:
            query, key = self.query_norm(query), self.key_norm(key)
        if context.tables is not None:
            query = apply_rope(query, context.tables)
            # Otherwise a cache stores keys unrotated.
            if context.key_tables is None:
                key = apply_rope(key, context.tables)
        scale, softcap = config.attention_scale, config.attention_softcap
        if cache is None:
            out = attend(query, key, value, context, scale=scale, softcap=softcap)
        else:
            old, new = cache, (key, value)
            cache = tuple(caching.write_vectors(c, n, context.slots) for c, n in zip(old, new))
            seen = cache
            if context.concatenate:
                seen = (
                    jnp.concatenate([c.astype(n.dtype), jnp.swapaxes(n, 1, 2)], axis=2)
                    for c, n in zip(old, new)
                )
            key, value = (c.astype(query.dtype) for c in seen)
            if context.key_tables is not None:
                key = apply_rope(key, context.key_tables, heads_axis=1)
            out = attend_heads_first(query, key, value, context.mask, scale=scale, softcap=softcap)
        return project(self.output, out.reshape(batch, time, -1), lora, "output", rows), cache
