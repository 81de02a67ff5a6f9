"""Product quantisation of head rows: no ties, few parameters, a normaliser over V."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Float, Int, Integer, Key

from logitjax.heads._head_cost import HeadCost, product_cost
from logitjax.heads._vocabulary_head import Assignment, VocabularyHead, log_unigram
from logitjax.heads._vq_kmeans import fit_kmeans
from logitjax.heads._vq_shortlist import Rescore
from logitjax.losses import linear_cross_entropy
from logitjax.ops import Array


def product_kernel(
    codebooks: Float[Array, "groups codes part"], codes: Integer[Array, "vocab groups"]
) -> Float[jax.Array, "vocab hidden"]:
    """The rows that the codes stand for: with them every loss of a full head applies.

    ::

        w_v = [C^1_{m_1(v)}; ...; C^G_{m_G(v)}]

    Args:
      codebooks: ``[groups, codes, hidden / groups]``.
      codes: ``[vocab, groups]``, the code of each entry in each group.

    Returns:
      ``[vocab, hidden]``. Training through it costs what a full head costs; O(K) normalisation
      is lost, because a grid of codes is not a product of clusters.

    >>> print(product_kernel(jnp.arange(4.0).reshape(2, 2, 1), jnp.array([[0, 1], [1, 0]])))
    [[0. 3.]
     [1. 2.]]
    """
    codebooks, codes = jnp.asarray(codebooks), jnp.asarray(codes)
    rows = codebooks[jnp.arange(codebooks.shape[0]), codes.astype(jnp.int32)]
    return rows.reshape(codes.shape[0], -1)


def product_logits(
    hidden: Float[Array, "*batch hidden"],
    codebooks: Float[Array, "groups codes part"],
    codes: Integer[Array, "vocab groups"],
    bias: Float[Array, " vocab"] | None = None,
) -> Float[jax.Array, "*batch vocab"]:
    """All V logits in O(K d + V groups) per token: one small table a group, then look-ups.

    ::

        logit_v = sum_g (h_g . C^g_{m_g(v)}) + b_v

    Args:
      hidden: ``[*batch, hidden]``.
      codebooks: ``[groups, codes, hidden / groups]``.
      codes: ``[vocab, groups]``.
      bias: ``[vocab]`` or None.

    Returns:
      ``[*batch, vocab]``, float32.

    >>> product_logits(jnp.ones((1, 2)), jnp.arange(4.0).reshape(2, 2, 1), jnp.array([[0, 1]]))
    Array([[3.]], dtype=float32)
    """
    tables = _tables(jnp.asarray(hidden), jnp.asarray(codebooks))
    by_group = jnp.asarray(codes).astype(jnp.int32).T

    def add(total: jax.Array, group: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        table, code = group
        return total + jnp.take(table, code, axis=-1), None

    shape = (*tables.shape[:-2], by_group.shape[1])
    start = jnp.zeros(shape, tables.dtype)
    total, _ = lax.scan(add, start, (jnp.moveaxis(tables, -2, 0), by_group))
    return total if bias is None else total + jnp.asarray(bias)


def product_rows(
    codebooks: Float[Array, "groups codes part"],
    codes: Integer[Array, "vocab groups"],
    bias: Float[Array, " vocab"] | None = None,
) -> Rescore:
    """Re-scoring of a shortlist with product-quantised rows: ``groups`` look-ups a token.

    >>> rescore = product_rows(jnp.arange(4.0).reshape(2, 2, 1), jnp.array([[0, 1], [1, 0]]))
    >>> rescore(jnp.ones((1, 2)), jnp.array([[1, 0]]))
    Array([[3., 3.]], dtype=float32)
    """
    codebooks, codes = jnp.asarray(codebooks), jnp.asarray(codes)

    def rescore(hidden: jax.Array, tokens: jax.Array) -> jax.Array:
        tables = _tables(hidden, codebooks)
        chosen = codes[tokens].astype(jnp.int32)
        groups = jnp.arange(codebooks.shape[0])
        rows = jnp.arange(hidden.shape[0])[:, None, None]
        scores = tables[rows, groups, chosen].sum(-1)
        return scores if bias is None else scores + jnp.asarray(bias)[tokens]

    return rescore


def fit_product_codes(
    rows: Float[Array, "vocab hidden"],
    unigram: Float[Array, " vocab"],
    hidden_cov: Float[Array, "hidden hidden"],
    *,
    groups: int,
    num_codes: int = 256,
    key: Key[jax.Array, ""] | None = None,
    iterations: int = 15,
    weight_power: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """Codebooks and codes for a head's rows, by k-means in each group of dimensions.

    Each group uses its own block of the covariance: correlations between groups are left out.

    Args:
      rows: ``[vocab, hidden]``.
      unigram: ``[vocab]`` probabilities or counts; rows are weighted by a power of it.
      hidden_cov: ``[hidden, hidden]``.
      groups: into how many parts the hidden dimensions are cut.
      num_codes: codes per group; with at most 256 a code is one byte.
      key: of the initial centres.
      iterations: of Lloyd's algorithm.
      weight_power: rows weigh ``unigram ** weight_power``.

    Returns:
      ``(codebooks [groups, codes, hidden / groups], codes [vocab, groups])``; codes are uint8 or
      uint16.

    Raises:
      ValueError: ``groups`` does not divide the hidden dimensions.

    >>> codebooks, codes = fit_product_codes(jnp.eye(4), jnp.ones(4), jnp.eye(4), groups=2,
    ...                                      num_codes=3)
    >>> bool(jnp.allclose(product_kernel(codebooks, codes), jnp.eye(4)))
    True

    References:
      Jegou et al., Product quantization for nearest neighbor search, 2011.
    """
    rows, cov = jnp.asarray(rows), jnp.asarray(hidden_cov, jnp.float32)
    vocab, width = rows.shape
    if width % groups:
        raise ValueError(f"groups must divide the {width} hidden dimensions, got {groups}")
    part = width // groups
    keys = jax.random.split(jax.random.key(0) if key is None else key, groups)
    weights = jnp.maximum(jnp.asarray(unigram, jnp.float32), 1e-12) ** weight_power
    found = []
    for g in range(groups):
        block = slice(g * part, (g + 1) * part)
        found.append(
            fit_kmeans(
                rows[:, block],
                weights,
                cov[block, block],
                min(num_codes, vocab),
                key=keys[g],
                iterations=iterations,
            )
        )
    codes = jnp.stack([f.assignment for f in found], axis=1)
    small = jnp.uint8 if num_codes <= 256 else jnp.uint16
    return jnp.stack([f.centres for f in found]), codes.astype(small)


class ProductHead(VocabularyHead):
    """`product_logits` as a module, to be injected into a decoder. The codes are not trained.

    Args:
      hidden_size: d.
      vocab_size: V.
      groups: into how many parts the hidden dimensions are cut.
      num_codes: codes a group.
      codes: ``[vocab, groups]``, e.g. of `fit_product_codes`; random when omitted.
      unigram: ``[vocab]`` counts or probabilities: biases begin at its logarithm.
      dtype: compute dtype.
      param_dtype: dtype of the codebooks.
      rngs: source of the initial codebooks.

    >>> ProductHead(8, 20, groups=4, num_codes=5, rngs=nnx.Rngs(0))(jnp.ones((2, 8))).shape
    (2, 20)
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        groups: int,
        num_codes: int = 256,
        codes: Array | None = None,
        unigram: Array | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if hidden_size % groups:
            raise ValueError(f"groups must divide hidden_size={hidden_size}, got {groups}")
        small = jnp.uint8 if num_codes <= 256 else jnp.uint16
        if codes is None:
            codes = jax.random.randint(rngs.params(), (vocab_size, groups), 0, num_codes)
        elif codes.shape != (vocab_size, groups):
            raise ValueError(f"codes must be of shape {(vocab_size, groups)}, got {codes.shape}")
        self.dtype = dtype
        init = nnx.initializers.normal(hidden_size**-0.5)
        shape = (groups, num_codes, hidden_size // groups)
        self.codebooks = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(log_unigram(unigram, vocab_size))
        self.codes = Assignment(jnp.asarray(codes).astype(small))

    @classmethod
    def from_fit(
        cls, codebooks: Array, codes: Array, bias: Array | None = None, **options: Any
    ) -> "ProductHead":
        """The head that `fit_product_codes` found."""
        groups, num_codes, part = codebooks.shape
        head = cls(
            groups * part,
            codes.shape[0],
            groups=groups,
            num_codes=num_codes,
            codes=codes,
            rngs=nnx.Rngs(0),
            **options,
        )
        head.codebooks[...] = jnp.asarray(codebooks, head.codebooks.dtype)
        if bias is not None:
            head.bias[...] = jnp.asarray(bias, head.bias.dtype)
        return head

    def __call__(
        self, hidden: Float[Array, "*batch hidden"], embedding: Array | None = None
    ) -> Float[jax.Array, "*batch vocab"]:
        hidden = jnp.asarray(hidden, self.dtype)
        return product_logits(hidden, self.codebooks[...], self.codes[...], self.bias[...])

    def nll(
        self,
        hidden: Float[Array, "*batch hidden"],
        labels: Int[Array, "*batch"],
        embedding: Array | None = None,
        **options: Any,
    ) -> Float[jax.Array, "*batch"]:
        """Cross-entropy, not reduced, through `product_kernel`; see `linear_cross_entropy`."""
        kernel, bias, axis = self.kernel_and_bias()
        hidden = jnp.asarray(hidden, self.dtype)
        return linear_cross_entropy(hidden, kernel, labels, bias=bias, vocab_axis=axis, **options)

    def kernel_and_bias(self, embedding: Array | None = None) -> tuple[Array, Array, int]:
        """The equivalent full head, ``[vocab, hidden]``: for losses that take a kernel."""
        return product_kernel(self.codebooks[...], self.codes[...]), self.bias[...], 0

    def cost(self) -> HeadCost:
        """What it costs; see `HeadCost`."""
        groups, num_codes, part = self.codebooks.shape
        return product_cost(
            self.codes.shape[0],
            groups * part,
            groups,
            codes=num_codes,
            itemsize=self.codebooks.dtype.itemsize,
        )


def _tables(hidden: jax.Array, codebooks: jax.Array) -> jax.Array:
    groups, _, part = codebooks.shape
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum(
        "...gp,gkp->...gk",
        hidden.reshape(*hidden.shape[:-1], groups, part),
        codebooks.astype(hidden.dtype),
        preferred_element_type=wide,
    )
