"""Attention within packed rows by the splash kernels that JAX ships for TPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from logitjax.models._config import Window
from logitjax.ops import Array, sharding
from logitjax.ops import mesh as on_mesh

# Queries and keys per block: the kernels take multiples of 128, and 512 fit every chip's VMEM.
_LANES, _BLOCK = 128, 512


def splash_attention(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch time kv_heads dim"],
    value: Float[Array, "batch time kv_heads dim"],
    segments: Int[Array, "batch time"],
    *,
    scale: float,
    softcap: float | None = None,
    window: Window = None,
    interpret: bool = False,
) -> Float[jax.Array, "batch time heads dim"]:
    """`blocked_attention` of whole rows on a TPU; padding, of segment -1, gets zeros."""
    run = functools.partial(
        _local, scale=scale, softcap=softcap, window=window, interpret=interpret
    )
    # A kernel has no sharding rule: each device has its rows and heads. Axes that divide neither,
    # such as 3 key heads on two devices, repeat the work.
    names = sharding.MeshAxes.current()
    rows = on_mesh.auto_axes(names.rows, query.shape[0])
    heads = on_mesh.auto_axes(names.columns, key.shape[2])
    if not (free := on_mesh.free_axes()):
        return run(query, key, value, segments)
    spec, ids = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    return jax.shard_map(
        run, in_specs=(spec, spec, spec, ids), out_specs=spec, axis_names=free, check_vma=False
    )(query, key, value, segments)


def _local(
    query: Any,
    key: Any,
    value: Any,
    segments: Any,
    *,
    scale: float,
    softcap: float | None,
    window: Window,
    interpret: bool,
) -> jax.Array:
    time, heads = query.shape[1:3]
    block = min(_BLOCK, -(-time // _LANES) * _LANES)
    rounded = -(-time // block) * block
    shape = (rounded, rounded)
    # The window includes a query's own key.
    mask = (
        splash.CausalMask(shape)
        if window is None
        else splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    )
    # Everything except the layouts. The fused backward kernel would keep a gradient of the queries
    # for every block of keys: 10 GiB for 32,768 tokens and 20 heads, 40 GiB for twice the tokens.
    sizes = splash.BlockSizes(block, block, block, block, block, block, block, block)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def padded(x: Any, fill: int = 0) -> Any:
        width = ((0, 0), (0, rounded - time)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, width, constant_values=fill)

    q, k, v = (jnp.swapaxes(padded(x), 1, 2) for x in (query * scale, key, value))
    # Padding sees padding, so that no row of scores is empty.
    ids = padded(segments, -1)
    out: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(q=ids, kv=ids))
    out = jnp.swapaxes(out, 1, 2)[:, :time]
    return jnp.where((segments >= 0)[..., None, None], out, 0).astype(value.dtype)
