"""Attention whose scores exist only one block at a time, forward and backward, by XLA."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from logitjax.models._config import Window
from logitjax.ops import Array

# Scores of a block are BLOCK x BLOCK per head: 1 MiB in float32.
BLOCK = 512


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    softcap: float | None
    window: Window
    block: int


def blocked_attention(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch slots kv_heads dim"],
    value: Float[Array, "batch slots kv_heads dim"],
    query_segments: Int[Array, "batch time"],
    key_segments: Int[Array, "batch slots"],
    start: Any = 0,
    *,
    scale: float,
    softcap: float | None = None,
    window: Window = None,
    block: int | None = None,
) -> Float[jax.Array, "batch time heads dim"]:
    """Causal attention within segments; memory grows with `time`, not with its square.

    Query `t` is at position `start + t` and sees keys of its own segment up to its position, at
    most `window` of them; keys of segment -1 are padding. A query without a key gets 0. Algorithms
    1 and 2 of Dao, FlashAttention-2 (arXiv 2307.08691).
    """
    batch, time, heads, dim = query.shape
    slots, groups = key.shape[1], key.shape[2]
    block = min(block or BLOCK, max(time, slots))
    # Padding to whole blocks.
    rows, columns = -time % block, -slots % block
    # [batch, groups, heads of a group, time, dim] and [batch, groups, slots, dim].
    q = jnp.moveaxis(jnp.reshape(query, (batch, time, groups, heads // groups, dim)), 1, 3)
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, rows), (0, 0)))
    k, v = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, columns), (0, 0))) for x in (key, value)
    )
    q_ids = jnp.pad(jnp.asarray(query_segments), ((0, 0), (0, rows)), constant_values=-2)
    # Padding matches nothing: padded keys have -1, padded queries -2.
    k_ids = jnp.pad(jnp.asarray(key_segments), ((0, 0), (0, columns)), constant_values=-1)
    q_ids = jnp.where(q_ids < 0, -2, q_ids)
    options = _Options(scale, softcap, window, block)
    out: Any = _attention(q, k, v, q_ids, k_ids, jnp.asarray(start, jnp.int32), options)
    return jnp.moveaxis(out[..., :time, :], 3, 1).reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q: Any, k: Any, v: Any, q_ids: Any, k_ids: Any, start: Any, options: Any) -> Any:
    return _forward(q, k, v, q_ids, k_ids, start, options)[0]


def _forward(q: Any, k: Any, v: Any, q_ids: Any, k_ids: Any, start: Any, options: Any) -> Any:
    size = options.block

    def rows(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = start + i * size
        q_i, ids = _cut(q, i, size, 3), _cut(q_ids, i, size, 1)

        def add(j: jax.Array, sums: Any) -> Any:
            peak, mass, total = sums
            scores, _, mask = _scores(q_i, _cut(k, j, size, 2), ids, k_ids, first, j, options)
            new = jnp.maximum(peak, jnp.where(mask, scores, -jnp.inf).max(-1))
            # A row that has seen no key yet keeps a peak of -inf, which cannot be subtracted.
            finite = jnp.where(new == -jnp.inf, 0.0, new)
            weights = jnp.where(mask, jnp.exp(scores - finite[..., None]), 0.0)
            decay = jnp.exp(peak - finite)
            values = _cut(v, j, size, 2)
            part = jnp.einsum(
                "bkgqs,bksd->bkgqd",
                # Sums stay in float32.
                weights.astype(v.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            return new, mass * decay + weights.sum(-1), total * decay[..., None] + part

        shape = q_i.shape[:-1]
        begin = (
            jnp.full(shape, -jnp.inf, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(q_i.shape, jnp.float32),
        )
        peak, mass, total = lax.fori_loop(*_range(first, k, options), add, begin)
        # A row without keys: 0 / 1.
        mass = jnp.where(mass > 0, mass, 1.0)
        normaliser = jnp.where(peak == -jnp.inf, 0.0, peak) + jnp.log(mass)
        return (total / mass[..., None]).astype(v.dtype), normaliser

    out, normalisers = lax.map(rows, jnp.arange(q.shape[3] // size))
    return _joined(out), _joined(normalisers[..., None])[..., 0]


def _save(q: Any, k: Any, v: Any, q_ids: Any, k_ids: Any, start: Any, options: Any) -> Any:
    out, normalisers = _forward(q, k, v, q_ids, k_ids, start, options)
    return out, (q, k, v, q_ids, k_ids, start, out, normalisers)


def _backward(options: Any, saved: Any, cotangent: Any) -> tuple[Any, ...]:
    q, k, v, q_ids, k_ids, start, out, normalisers = saved
    size, f32 = options.block, jnp.float32
    # The softmax subtracts this from each weight's cotangent.
    means = (out.astype(f32) * cotangent.astype(f32)).sum(-1)

    def rows(sums: Any, i: jax.Array) -> Any:
        first = start + i * size
        q_i, ids = _cut(q, i, size, 3), _cut(q_ids, i, size, 1)
        ct, log_z, mean = (
            _cut(cotangent, i, size, 3),
            _cut(normalisers, i, size, 3)[..., None],
            _cut(means, i, size, 3)[..., None],
        )

        def add(j: jax.Array, sums: Any) -> Any:
            dq, dk, dv = sums
            k_j, v_j = _cut(k, j, size, 2), _cut(v, j, size, 2)
            scores, slope, mask = _scores(q_i, k_j, ids, k_ids, first, j, options)
            weights = jnp.where(mask, jnp.exp(scores - log_z), 0.0)
            pulled = jnp.einsum("bkgqd,bksd->bkgqs", ct, v_j, preferred_element_type=f32)
            # The softmax's backward pass: P (dP - D), with D = out . cotangent of a row.
            inner = (weights * (pulled - mean) * slope * options.scale).astype(q.dtype)
            dq += jnp.einsum("bkgqs,bksd->bkgqd", inner, k_j, preferred_element_type=f32)
            new_k = jnp.einsum("bkgqs,bkgqd->bksd", inner, q_i, preferred_element_type=f32)
            new_v = jnp.einsum(
                "bkgqs,bkgqd->bksd", weights.astype(ct.dtype), ct, preferred_element_type=f32
            )
            return dq, _add(dk, new_k, j, size), _add(dv, new_v, j, size)

        dq, dk, dv = lax.fori_loop(
            *_range(first, k, options), add, (jnp.zeros(q_i.shape, f32), *sums)
        )
        return (dk, dv), dq.astype(q.dtype)

    zeros = (jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32))
    (dk, dv), dq = lax.scan(rows, zeros, jnp.arange(q.shape[3] // size))
    return _joined(dq), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attention.defvjp(_save, _backward)


def _scores(
    q: Any, k: Any, q_ids: Any, k_ids: Any, first: Any, j: Any, options: _Options
) -> tuple[jax.Array, jax.Array | float, jax.Array]:
    """Scores of a block in float32, the slope of their cap, and the mask of those that count."""
    size = options.block
    scores = options.scale * jnp.einsum(
        "bkgqd,bksd->bkgqs", q, k, preferred_element_type=jnp.float32
    )
    slope: Any = 1.0
    if options.softcap is not None:
        bent = jnp.tanh(scores / options.softcap)
        # tanh' = 1 - tanh^2.
        scores, slope = options.softcap * bent, 1.0 - bent**2
    row = first + lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = j * size + lax.broadcasted_iota(jnp.int32, (size, size), 1)
    near = row >= column
    if options.window is not None:
        near &= row - column < options.window
    same = q_ids[:, :, None] == _cut(k_ids, j, size, 1)[:, None, :]
    return scores, slope, (near & same)[:, None, None]


def _range(first: Any, k: Any, options: _Options) -> tuple[Any, Any]:
    """The range of key blocks, first and end, of which some query of a block may see one."""
    size = options.block
    stop = jnp.minimum((first + size - 1) // size + 1, k.shape[2] // size)
    if options.window is None:
        return jnp.zeros_like(stop), stop
    # None before the window.
    return jnp.maximum(first - options.window + 1, 0) // size, stop


def _cut(x: Any, i: Any, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _add(x: Any, part: Any, i: Any, size: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, _cut(x, i, size, 2) + part, i * size, 2)


def _joined(blocks: jax.Array) -> jax.Array:
    """`[blocks, batch, groups, heads, size, dim]` as one time axis."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, moved.shape[-1])
