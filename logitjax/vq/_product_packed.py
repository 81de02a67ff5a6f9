"""Product quantisation by 16 codes a group: half a byte each, looked up in tables of bytes."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Integer, UInt8

from logitjax import kernels
from logitjax.ops import Array
from logitjax.ops.sharding import over_batch
from logitjax.vq._product import product_logits, product_tables

_BLOCK = 32
_CODES = 16


def pack_codes(codes: Integer[Array, "vocab groups"]) -> UInt8[jax.Array, "blocks pairs 32"]:
    """Two codes a byte, in the order in which 32 tokens are looked up at once.

    A block is 32 tokens, a pair two groups. Byte ``16 s + j`` of block b and pair p holds the codes
    of group ``2 p + s`` for the tokens ``32 b + j`` (low half) and ``32 b + 16 + j`` (high half).
    Tokens and groups that complete a block or a pair have code 0.

    Args:
      codes: ``[vocab, groups]`` integers, 0..15, e.g. of ``fit_product_codes(..., num_codes=16)``.
        While it is traced nobody can look at a code: one outside is taken for the nearest end,
        so that it cannot change the code of another token in the same byte.

    Returns:
      ``[ceil(vocab / 32), ceil(groups / 2), 32]``, uint8.

    Raises:
      TypeError: the codes are not integers.
      ValueError: a concrete code is not in 0..15.

    >>> pack_codes(jnp.array([[1, 2], [3, 4]]))[0, 0, :2], pack_codes(jnp.ones((40, 3), int)).shape
    (Array([1, 3], dtype=uint8), (2, 2, 32))

    References:
      Andre et al., Cache locality is not enough: high-performance nearest neighbor search with
      product quantization fast scan, 2015, for the layout's idea.
    """
    codes = jnp.asarray(codes)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"codes: expected integers, got {codes.dtype}")
    with contextlib.suppress(jax.errors.ConcretizationTypeError):  # while it is traced
        least, most = int(codes.min(initial=0)), int(codes.max(initial=0))
        if least < 0 or most >= _CODES:
            raise ValueError(f"codes: expected 0 to 15, got {least} to {most}")
    vocab, groups = codes.shape
    codes = jnp.clip(codes, 0, _CODES - 1).astype(jnp.uint8)
    codes = jnp.pad(codes, ((0, -vocab % _BLOCK), (0, -groups % 2)))
    halves = codes.reshape(-1, 2, _BLOCK // 2, codes.shape[1])
    packed = halves[:, 0] | (halves[:, 1] << 4)
    # [blocks, 16 tokens, pairs, 2] -> [blocks, pairs, 2, 16 tokens]
    packed = packed.reshape(*packed.shape[:2], -1, 2).transpose(0, 2, 3, 1)
    return packed.reshape(*packed.shape[:2], _BLOCK)


def unpack_codes(
    packed: UInt8[Array, "blocks pairs 32"], vocab: int, groups: int
) -> UInt8[jax.Array, "vocab groups"]:
    """What `pack_codes` packed.

    Args:
      packed: ``[ceil(vocab / 32), ceil(groups / 2), 32]``.
      vocab: tokens that were packed.
      groups: groups that were packed.

    Returns:
      ``[vocab, groups]``, uint8, 0..15.

    >>> unpack_codes(pack_codes(jnp.array([[1, 2, 3]])), 1, 3)
    Array([[1, 2, 3]], dtype=uint8)
    """
    packed = jnp.asarray(packed)
    blocks, pairs, _ = packed.shape
    by_token = packed.reshape(blocks, pairs, 2, _BLOCK // 2).transpose(0, 3, 1, 2)
    by_token = by_token.reshape(blocks, _BLOCK // 2, 2 * pairs)
    codes = jnp.stack([by_token & 15, by_token >> 4], axis=1)
    return codes.reshape(blocks * _BLOCK, 2 * pairs)[:vocab, :groups]


def packed_logits(
    hidden: Float[Array, "*batch hidden"],
    codebooks: Float[Array, "groups codes part"],
    packed: UInt8[Array, "blocks pairs 32"],
    bias: Float[Array, " vocab"],
) -> Float[jax.Array, "*batch vocab"]:
    """`product_logits` with tables rounded to bytes, whose sums a CPU takes 32 at a time.

    ::

        t_gk = h_g . C^g_k,  low_g = min_k t_gk,  s = max_gk (t_gk - low_g) / 255
        logit_v = s sum_g round((t_g,m_g(v) - low_g) / s) + sum_g low_g + b_v

    The integers are the same on all platforms. A logit is at most ``groups * s / 2`` from
    `product_logits`, and of the order of ``s sqrt(groups / 12)``: enough to screen.

    Args:
      hidden: ``[*batch, hidden]``.
      codebooks: ``[groups, codes, hidden / groups]``, at most 16 codes.
      packed: `pack_codes` of ``[vocab, groups]``.
      bias: ``[vocab]``.

    Returns:
      ``[*batch, vocab]``, float32. Gradients are those of `product_logits`: of what was rounded.

    Raises:
      ValueError: ``packed`` is not for that vocabulary and that many groups, or there are more than
        16 codes.

    >>> books = jnp.arange(4.0).reshape(2, 2, 1)
    >>> packed_logits(jnp.ones((1, 2)), books, pack_codes(jnp.array([[0, 1]])), jnp.zeros(1))
    Array([[3.]], dtype=float32)
    """
    hidden, codebooks = jnp.asarray(hidden), jnp.asarray(codebooks)
    packed, bias = jnp.asarray(packed), jnp.asarray(bias)
    (groups, num_codes, _), vocab = codebooks.shape, bias.shape[0]
    expected = (-(-vocab // _BLOCK), -(-groups // 2), _BLOCK)
    if packed.shape != expected or num_codes > _CODES:
        raise ValueError(
            f"{vocab} tokens and {groups} groups of at most {_CODES} codes are packed as "
            f"{expected}, got {packed.shape} and {num_codes} codes"
        )

    def logits(hidden: jax.Array, *head: jax.Array) -> tuple[jax.Array]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return (_logits(flat, *head).reshape(*hidden.shape[:-1], vocab),)

    return over_batch(logits, (hidden.ndim,), hidden, codebooks, packed, bias)[0]


@jax.custom_jvp
def _logits(
    hidden: jax.Array, codebooks: jax.Array, packed: jax.Array, bias: jax.Array
) -> jax.Array:
    tables = product_tables(hidden, codebooks)
    low = tables.min(-1, keepdims=True)
    step = (tables - low).max((-2, -1), keepdims=True) / 255
    # Tables that say nothing are all zeros.
    rounded = jnp.round((tables - low) / jnp.where(step > 0, step, 1)).astype(jnp.uint8)
    groups, num_codes = tables.shape[1:]
    rounded = jnp.pad(rounded, ((0, 0), (0, groups % 2), (0, _CODES - num_codes)))
    sums = kernels.on_cpu(kernels.lookup_sums, _sums, rounded, packed)[:, : bias.shape[0]]
    return step[:, 0] * sums.astype(tables.dtype) + low.sum((-2, -1))[:, None] + bias


@_logits.defjvp
def _logits_jvp(primals: Any, tangents: Any) -> Any:
    hidden, codebooks, packed, bias = primals
    codes = unpack_codes(packed, bias.shape[0], codebooks.shape[0])

    def unrounded(hidden: jax.Array, codebooks: jax.Array, bias: jax.Array) -> jax.Array:
        return product_logits(hidden, codebooks, codes, bias)

    moving = (hidden, codebooks, bias)
    changes = (tangents[0], tangents[1], tangents[3])
    return _logits(*primals), jax.jvp(unrounded, moving, changes)[1]


def _sums(tables: jax.Array, packed: jax.Array) -> jax.Array:
    """`logitjax.kernels.lookup_sums` for any platform, a group at a time."""
    blocks, pairs, _ = packed.shape
    by_group = unpack_codes(packed, blocks * _BLOCK, 2 * pairs).T

    def add(total: jax.Array, group: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        table, codes = group
        return total + jnp.take(table, codes.astype(np.int32), axis=-1).astype(jnp.int32), None

    start = jnp.zeros((tables.shape[0], blocks * _BLOCK), jnp.int32)
    total, _ = lax.scan(add, start, (jnp.moveaxis(tables, 1, 0), by_group))
    return total
