"""Product quantisation of head rows: no ties, few parameters, a normaliser over V."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Integer, Key, UInt8

from logitjax.kernels import native
from logitjax.ops import Array, checks
from logitjax.ops import mesh as on_mesh
from logitjax.vq._kmeans import fit_kmeans

#: Number of positions up to which tables are sums of scalar products.
_FEW = 4
#: Packed codes: tokens per block, and maximum codes per group.
_BLOCK = 32
_CODES = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProductCodes:
    """Rows of a head as product codes: one of at most 16 codes in each group of dimensions.

    A row is ``w_v = [C^1_{m_1(v)}; ...; C^G_{m_G(v)}]``.

    Attributes:
        codebooks: ``[groups, codes, hidden / groups]``.
        codes: ``[vocab / 32, groups / 2, 32]``, rounded up, uint8: the code of each token in each
            group, two in a byte, in the order in which a CPU looks up 32 tokens at once.
        bias: ``[vocab]``.
    """

    codebooks: Any
    codes: Any
    bias: Any

    @classmethod
    def fit(
        cls,
        rows: Float[Array, "vocab hidden"],
        unigram: Float[Array, " vocab"],
        hidden_cov: Float[Array, "hidden hidden"],
        *,
        groups: int,
        num_codes: int = 16,
        key: Key[jax.Array, ""] | None = None,
        iterations: int = 15,
    ) -> "ProductCodes":
        """Codes for the rows of a head, by k-means in each group of dimensions; biases are 0.

        Each group uses its own block of the covariance, without correlations between groups. By
        Jegou et al., Product quantization for nearest neighbor search, 2011.

        Args:
            rows, unigram, hidden_cov, key, iterations: as for `fit_assignment`.
            groups: number of parts of the hidden dimensions; ValueError if it does not divide them.
            num_codes: number of codes per group, at most 16.

        >>> found = ProductCodes.fit(np.eye(4), np.ones(4), np.eye(4), groups=2, num_codes=3)
        >>> np.allclose(jax.jit(ProductCodes.kernel)(found), np.eye(4))
        True
        """
        rows, cov = jnp.asarray(rows), jnp.asarray(hidden_cov, jnp.float32)
        vocab, width = rows.shape
        if width % groups:
            raise ValueError(f"groups: expected a divisor of {width}, got {groups}")
        checks.between(num_codes, 1, _CODES, "num_codes")
        part, count = width // groups, min(num_codes, vocab)
        keys = jax.random.split(jax.random.key(0) if key is None else key, groups)
        weights = jnp.sqrt(jnp.maximum(jnp.asarray(unigram, jnp.float32), 1e-12))
        blocks = [slice(start, start + part) for start in range(0, width, part)]
        items = [
            fit_kmeans(rows[:, b], weights, cov[b, b], count, key=key, iterations=iterations)
            for b, key in zip(blocks, keys, strict=True)
        ]
        codes, centres = zip(*items, strict=True)
        return cls(jnp.stack(centres), pack_codes(jnp.stack(codes, axis=1)), jnp.zeros(vocab))

    def kernel(self) -> Float[jax.Array, "vocab hidden"]:
        """The rows that the codes represent, `[vocab, hidden]`, for any loss of a full head.

        Training through it costs as much as a full head; O(K) normalisation is impossible, because
        a grid of codes is not a product of clusters.
        """
        self._check()
        codebooks, vocab = jnp.asarray(self.codebooks), self.bias.shape[0]
        groups = codebooks.shape[0]
        codes = unpack_codes(self.codes, vocab, groups).astype(jnp.int32)
        return codebooks[jnp.arange(groups), codes].reshape(vocab, -1)

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[jax.Array, "*batch vocab"]:
        """Logits by a small table per group and look-ups in it: ``[*batch, vocab]``, float32.

        Tables are rounded to bytes, of which a CPU sums 32 at a time. A logit is within ``groups *
        s / 2`` of that of the `kernel`, whose gradients it has: enough to screen. ::

            t_gk = h_g . C^g_k,  low_g = min_k t_gk,  s = max_gk (t_gk - low_g) / 255
            logit_v = s sum_g round((t_g,m_g(v) - low_g) / s) + sum_g low_g + b_v
        """
        self._check(hidden)
        hidden, vocab = jnp.asarray(hidden), self.bias.shape[0]

        def logits(hidden: jax.Array, *head: jax.Array) -> tuple[jax.Array]:
            flat = hidden.reshape(-1, hidden.shape[-1])
            return (_logits(flat, *head).reshape(*hidden.shape[:-1], vocab),)

        head = (jnp.asarray(x) for x in (self.codebooks, self.codes, self.bias))
        return on_mesh.over_batch(logits, (hidden.ndim,), hidden, *head)[0]

    def _check(self, hidden: Any = None) -> None:
        """Refuse parts that do not fit together or fit hidden states."""
        checks.shapes(
            codebooks=(self.codebooks, "float groups codes part"),
            codes=(self.codes, "int blocks pairs tokens"),
            bias=(self.bias, "float vocab"),
            hidden=(hidden, "float *batch hidden"),
        )
        (groups, num_codes, part), vocab = self.codebooks.shape, self.bias.shape[0]
        expected = (-(-vocab // _BLOCK), -(-groups // 2), _BLOCK)
        if self.codes.shape != expected or num_codes > _CODES:
            raise ValueError(
                f"codes: expected shape {expected} of {vocab} tokens, {groups} groups and at most "
                f"{_CODES} codes, got {self.codes.shape} and {num_codes} codes"
            )
        if hidden is not None and hidden.shape[-1] != groups * part:
            raise ValueError(
                f"hidden: expected {groups * part} entries, {groups} groups of {part}, got shape "
                f"{hidden.shape}"
            )


def pack_codes(codes: Integer[Array, "vocab groups"]) -> UInt8[jax.Array, "blocks pairs 32"]:
    """Pack two codes per byte, in the order in which 32 tokens are looked up at once.

    Byte ``16 s + j`` of block b (32 tokens) and pair p (two groups) contains group ``2 p + s`` of
    the tokens ``32 b + j`` (low half) and ``32 b + 16 + j`` (high half), padded with 0. Idea: Andre
    et al., Product quantization fast scan, 2015.
    """
    codes = jnp.asarray(codes)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"codes: expected integers, got {codes.dtype}")
    # While being traced.
    with contextlib.suppress(jax.errors.ConcretizationTypeError):
        least, most = int(codes.min(initial=0)), int(codes.max(initial=0))
        if least < 0 or most >= _CODES:
            raise ValueError(f"codes: expected 0 to 15, got {least} to {most}")
    return _packed(codes)


@jax.jit
def _packed(codes: jax.Array) -> jax.Array:
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
    packed = jnp.asarray(packed)
    blocks, pairs, _ = packed.shape
    by_token = packed.reshape(blocks, pairs, 2, _BLOCK // 2).transpose(0, 3, 1, 2)
    by_token = by_token.reshape(blocks, _BLOCK // 2, 2 * pairs)
    codes = jnp.stack([by_token & 15, by_token >> 4], axis=1)
    return codes.reshape(blocks * _BLOCK, 2 * pairs)[:vocab, :groups]


def product_tables(hidden: jax.Array, codebooks: jax.Array) -> jax.Array:
    """``h_g . C^g_k``, ``[..., groups, codes]``."""
    groups, _, part = codebooks.shape
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    cut = hidden.reshape(*hidden.shape[:-1], groups, part)
    codebooks = codebooks.astype(hidden.dtype)
    if hidden.size <= _FEW * groups * part and part <= 8:
        # As many tiny products as groups cost more to launch than to compute.
        terms = (cut[..., i, None].astype(wide) * codebooks[..., i] for i in range(part))
        return functools.reduce(jnp.add, terms)
    return jnp.einsum("...gp,gkp->...gk", cut, codebooks, preferred_element_type=wide)


@jax.custom_jvp
def _logits(
    hidden: jax.Array, codebooks: jax.Array, packed: jax.Array, bias: jax.Array
) -> jax.Array:
    tables = product_tables(hidden, codebooks)
    low = tables.min(-1, keepdims=True)  # [n, groups, 1]
    step = (tables - low).max((-2, -1), keepdims=True) / 255
    # Constant tables are all zeros.
    rounded = jnp.round((tables - low) / jnp.where(step > 0, step, 1)).astype(jnp.uint8)
    groups, num_codes = tables.shape[1:]
    # An odd group adds 0.
    rounded = jnp.pad(rounded, ((0, 0), (0, groups % 2), (0, _CODES - num_codes)))
    sums = native.on_cpu(native.lookup_sums, _sums, rounded, packed)[:, : bias.shape[0]]
    return step[:, 0] * sums.astype(tables.dtype) + low.sum((-2, -1))[:, None] + bias


@_logits.defjvp
def _logits_jvp(primals: Any, tangents: Any) -> Any:
    hidden, codebooks, packed, bias = primals

    def unrounded(hidden: jax.Array, codebooks: jax.Array, bias: jax.Array) -> jax.Array:
        return hidden @ ProductCodes(codebooks, packed, bias).kernel().T + bias

    moving = (hidden, codebooks, bias)
    # Codes are not trained.
    changes = (tangents[0], tangents[1], tangents[3])
    return _logits(*primals), jax.jvp(unrounded, moving, changes)[1]


def _sums(tables: jax.Array, packed: jax.Array) -> jax.Array:
    """`native.lookup_sums` for any platform, a group at a time."""
    blocks, pairs, _ = packed.shape
    by_group = unpack_codes(packed, blocks * _BLOCK, 2 * pairs).T

    def add(total: jax.Array, group: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        table, codes = group
        return total + jnp.take(table, codes.astype(np.int32), axis=-1).astype(jnp.int32), None

    start = jnp.zeros((tables.shape[0], blocks * _BLOCK), jnp.int32)
    total, _ = lax.scan(add, start, (jnp.moveaxis(tables, 1, 0), by_group))
    return total
