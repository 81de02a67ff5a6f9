"""Product quantisation of head rows: no ties, few parameters, a normaliser over V."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Integer, Key

from logitjax.ops import Array
from logitjax.ops.sharding import over_batch
from logitjax.vq._kmeans import fit_kmeans
from logitjax.vq._shortlist import Rescore

#: Positions up to which tables are sums of products of numbers.
_FEW = 4


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
    hidden, codebooks, codes = jnp.asarray(hidden), jnp.asarray(codebooks), jnp.asarray(codes)

    def look_up(hidden: jax.Array, codebooks: jax.Array, codes: jax.Array) -> tuple[jax.Array]:
        tables = product_tables(hidden, codebooks)
        by_group = codes.astype(jnp.int32).T

        def add(total: jax.Array, group: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            table, code = group
            return total + jnp.take(table, code, axis=-1), None

        shape = (*tables.shape[:-2], by_group.shape[1])
        start = jnp.zeros(shape, tables.dtype)
        total, _ = lax.scan(add, start, (jnp.moveaxis(tables, -2, 0), by_group))
        return (total,)

    (total,) = over_batch(look_up, (hidden.ndim,), hidden, codebooks, codes)
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
        tables = product_tables(hidden, codebooks)
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


def product_tables(hidden: jax.Array, codebooks: jax.Array) -> jax.Array:
    """``h_g . C^g_k``, ``[..., groups, codes]``."""
    groups, _, part = codebooks.shape
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    cut = hidden.reshape(*hidden.shape[:-1], groups, part)
    codebooks = codebooks.astype(hidden.dtype)
    if hidden.size <= _FEW * groups * part and part <= 8:
        # As many tiny products as there are groups cost more to start than to do.
        terms = (cut[..., i, None].astype(wide) * codebooks[..., i] for i in range(part))
        return functools.reduce(jnp.add, terms)
    return jnp.einsum("...gp,gkp->...gk", cut, codebooks, preferred_element_type=wide)
