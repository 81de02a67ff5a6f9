"""Assignments of tokens to shared codes from the rows of a full head, and their best perplexity."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from logitjax.ops import Array, checks, logsumexp
from logitjax.vq._kmeans import fit_kmeans, over_rows, weighted_means
from logitjax.vq._loss import cluster_log_mass

# Rows, or hidden states, at a time: a block of scores is this many times the codes.
_BLOCK = 2048

Method = Literal["random", "kmeans", "weighted_kmeans"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VQFit:
    """A vector-quantised head fitted to a full one: each token's cluster, mean rows, biases."""

    assignment: jax.Array
    codebook: jax.Array
    bias: Any


def fit_assignment(
    rows: Float[Array, "vocab hidden"],
    unigram: Float[Array, " vocab"],
    hidden_mean: Float[Array, " hidden"],
    hidden_cov: Float[Array, "hidden hidden"],
    num_codes: int,
    *,
    method: Method = "weighted_kmeans",
    row_bias: Float[Array, " vocab"] | None = None,
    key: Key[jax.Array, ""] | None = None,
    iterations: int = 20,
) -> VQFit:
    """Fit mapping, codebook and biases to the rows of a full head.

    To second order, sharing a code costs half the variance of the error in the tokens' logits,
    under the head's own probabilities. Therefore ``'weighted_kmeans'`` clusters rows in the
    covariance metric of the hidden states, weighted by the square root of ``unigram``. ::

        sum_v sqrt(u_v) (w_v - C_{m(v)})^T Cov(h) (w_v - C_{m(v)})

    The other methods are ``'random'``, clusters of equal size, and ``'kmeans'``, on plain
    unweighted rows, from VQ-Logits (arXiv:2505.10202), which also names fixed mappings; weights
    and metric are ours. Memory is the rows plus 2,048 x codes, for any vocabulary.

    Args:
        rows: ``[vocab, hidden]``, rows of the full head, bfloat16 allowed.
        unigram: ``[vocab]``, probabilities or counts.
        hidden_mean, hidden_cov: mean and covariance of the hidden states.
        num_codes: clusters K, at most vocab.
        row_bias: ``[vocab]``, bias of the full head.
        iterations: number of iterations of Lloyd's algorithm.

    Raises:
        TypeError: arrays of another kind.
        ValueError: unknown method, ``num_codes`` out of range, shapes that do not fit, or (outside
            ``jit``) invalid probabilities.

    >>> rows = np.array([[1.0, 0.0], [1.1, 0.0], [0.0, 3.0], [0.0, 3.1]])
    >>> fit = fit_assignment(rows, np.ones(4), np.zeros(2), np.eye(2), 2)
    >>> first, second, third, fourth = fit.assignment.tolist()
    >>> first == second, third == fourth, first == third
    (True, True, False)
    """
    checks.shapes(
        rows=(rows, "float vocab hidden"),
        unigram=(unigram, "number vocab"),
        hidden_mean=(hidden_mean, "float hidden"),
        hidden_cov=(hidden_cov, "float hidden hidden"),
        row_bias=(row_bias, "float vocab"),
    )
    check_unigram(unigram)
    rows, unigram = jnp.asarray(rows), jnp.asarray(unigram, jnp.float32)
    vocab = rows.shape[0]
    if not 1 <= num_codes <= vocab:
        raise ValueError(f"num_codes: expected 1 to the vocabulary, {vocab}, got {num_codes}")
    if method not in Method.__args__:
        raise ValueError(f"method: expected one of {Method.__args__}, got {method!r}")
    key = jax.random.key(0) if key is None else key
    options = (num_codes, method, iterations)
    return _fitted(rows, unigram, hidden_mean, hidden_cov, row_bias, key, *options)


# One program; outside `jit` each operation would be one.
@jax.jit(static_argnames=("num_codes", "method", "iterations"))
def _fitted(
    rows: jax.Array,
    unigram: jax.Array,
    hidden_mean: Array,
    hidden_cov: Array,
    row_bias: Array | None,
    key: jax.Array,
    num_codes: int,
    method: Method,
    iterations: int,
) -> VQFit:
    vocab = rows.shape[0]
    weights = unigram / jnp.maximum(unigram.sum(), 1e-30)
    # Unseen tokens need a code too.
    weights = jnp.maximum(weights, 0.01 / vocab)
    if method == "random":
        order = jax.random.permutation(key, vocab)
        # Sizes differ by one.
        code = (jnp.arange(vocab) * num_codes // vocab).astype(jnp.int32)
        assignment = jnp.zeros(vocab, jnp.int32).at[order].set(code)
    else:
        plain = method == "kmeans"
        assignment, _ = fit_kmeans(
            rows,
            jnp.ones(vocab) if plain else jnp.sqrt(weights),
            None if plain else jnp.asarray(hidden_cov),
            num_codes,
            key=key,
            iterations=iterations,
        )
        # The covariance only affects the clusters: a nan in it would go unnoticed.
        rows = jnp.where(plain | jnp.isfinite(hidden_cov).all(), rows, jnp.nan)
    codebook, _ = weighted_means(rows, weights, assignment, num_codes)
    bias = centred_bias(rows, codebook, assignment, hidden_mean, row_bias)
    return VQFit(assignment, codebook, bias)


def check_unigram(unigram: Any) -> None:
    """Refuse values that are neither probabilities nor counts, if they can be read."""
    fine = "numbers of 0 or more"
    checks.values(unigram, lambda x: (x >= 0) & (x < np.inf), "unigram", fine)


def centred_bias(
    rows: Array,
    codebook: Array,
    assignment: Array,
    hidden_mean: Array,
    row_bias: Array | None = None,
) -> jax.Array:
    """Biases that make VQ logits equal the full head's at the mean hidden state."""
    mean = jnp.asarray(hidden_mean, jnp.float32)
    full = over_rows(lambda block: block.astype(jnp.float32) @ mean, jnp.asarray(rows), _BLOCK)
    # No error at the mean hidden state.
    bias = full - (codebook @ mean)[assignment]
    return bias if row_bias is None else bias + jnp.asarray(row_bias, jnp.float32)


def matched_bias(
    codebook: Float[Array, "codes hidden"],
    bias: Float[Array, " vocab"],
    assignment: Int[Array, " vocab"],
    counts: Float[Array, " vocab"],
    hidden: Float[Array, "count hidden"],
) -> Float[jax.Array, " vocab"]:
    """Biases that give every token its expected mass, to first order."""
    codebook = jnp.asarray(codebook, jnp.float32)
    mass = code_mass(codebook, bias, assignment, hidden)
    # An unseen token counts as one in a million.
    return jnp.log(jnp.maximum(jnp.asarray(counts, jnp.float32), 1e-6)) - mass[assignment]


def code_mass(codebook: Array, bias: Array, assignment: Array, hidden: Array) -> jax.Array:
    """``A_k = log sum_n exp(z_nk - log Z_n)``, the log mass of a token of bias 0 in each code."""
    log_mass = _log_mass(bias, assignment, codebook.shape[0])
    total: Array = np.full((codebook.shape[0],), -np.inf, np.float32)  # no mass yet
    for start in range(0, len(hidden), _BLOCK):
        block = np.asarray(hidden[start : start + _BLOCK], np.float32)
        total = _add_mass(total, codebook, log_mass, block)
    return jnp.asarray(total)


_log_mass = jax.jit(cluster_log_mass, static_argnums=2)


@jax.jit
def _add_mass(total: Array, codebook: Array, log_mass: Array, hidden: Array) -> jax.Array:
    scores = hidden @ codebook.T
    log_z = logsumexp(scores + log_mass)
    return jnp.logaddexp(total, logsumexp(scores - log_z[:, None], axis=0))


@dataclasses.dataclass(frozen=True)
class PerplexityFloor:
    """The bound that no mapping can exceed; see `perplexity_floor`.

    Attributes:
        perplexity: minimum perplexity of a head without bias.
        excess_nats: minimum number of nats per token that it loses to a full head.
        ratio: ``exp(excess_nats)``, the minimum factor on perplexity.
        singleton_mass: probability of tokens that have a code to themselves.
        codes_used: number of clusters that are not empty.
        largest: size of the largest cluster.
    """

    perplexity: float
    excess_nats: float
    ratio: float
    singleton_mass: float
    codes_used: int
    largest: int


def perplexity_floor(
    assignment: Int[Array, " vocab"], unigram: Float[Array, " vocab"]
) -> PerplexityFloor:
    """The lowest perplexity that training can reach if all tokens of a cluster share one logit.

    A bias per token removes both bounds. The remaining loss is the context's information about the
    token within its cluster. These bounds, ours, follow exactly from the logits of VQ-Logits,
    arXiv:2505.10202. ::

        perplexity >= exp(E log n_{m(X)})
        excess >= sum_k u_k KL(u(. | k) || uniform over the cluster)

    Raises:
        TypeError: arrays of another kind.
        ValueError: shapes that do not fit, negative clusters, or invalid probabilities.

    >>> floor = perplexity_floor(jnp.array([0, 0, 1]), jnp.array([1.0, 1.0, 2.0]))
    >>> round(floor.perplexity, 3), floor.ratio, floor.singleton_mass
    (1.414, 1.0, 0.5)
    """
    checks.shapes(assignment=(assignment, "int vocab"), unigram=(unigram, "number vocab"))
    assignment, prob = np.asarray(assignment), np.asarray(unigram, np.float64)
    checks.ids(assignment, 2**31, "assignment")
    check_unigram(prob)
    prob = prob / prob.sum()
    sizes = np.bincount(assignment)
    mass = np.bincount(assignment, prob)
    log_size = np.log(sizes[assignment])
    present = prob > 0
    # log u(v | k) + log n_k: the KL divergence of a cluster from uniform, token by token.
    within = np.log(prob[present] / mass[assignment[present]])
    excess = float((prob[present] * (within + log_size[present])).sum())
    return PerplexityFloor(
        perplexity=float(np.exp((prob * log_size).sum())),
        # Rounding may fall below 0.
        excess_nats=max(excess, 0.0),
        ratio=float(np.exp(max(excess, 0.0))),
        singleton_mass=float(mass[sizes == 1].sum()) if (sizes == 1).any() else 0.0,
        codes_used=int((sizes > 0).sum()),
        largest=int(sizes.max()),
    )
