"""Adaptive softmax: frequent tokens in full, rare ones in narrow tails; to compare with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Float, Int, Key

from logitjax.heads._head_cost import HeadCost
from logitjax.heads._low_rank import metric_roots
from logitjax.heads._vocabulary_head import Assignment, VocabularyHead
from logitjax.losses import Head
from logitjax.ops import Array, TopK, checks, gather_at, logsumexp


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """Sizes of an adaptive softmax.

    Attributes:
      vocab_size: V.
      hidden_size: d.
      cutoffs: ranks by frequency at which a tail begins: ``(2000, 10000)`` keeps 2,000 tokens in
        the head and makes two tails.
      div_value: tail i is ``hidden_size / div_value ** (i + 1)`` wide, rounded down, at least 1.

    >>> AdaptiveConfig(vocab_size=100, hidden_size=32, cutoffs=(10, 40)).widths
    (8, 2)
    """

    vocab_size: int
    hidden_size: int
    cutoffs: tuple[int, ...]
    div_value: float = 4.0

    def __post_init__(self) -> None:
        bounds = (0, *self.cutoffs, self.vocab_size)
        if list(bounds) != sorted(set(bounds)) or not self.cutoffs:
            raise ValueError(
                f"cutoffs: expected rising ranks below {self.vocab_size}, got {self.cutoffs}"
            )

    @property
    def tails(self) -> tuple[tuple[int, int], ...]:
        return tuple(zip(self.cutoffs, (*self.cutoffs[1:], self.vocab_size)))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(
            max(1, int(self.hidden_size / self.div_value ** (i + 1)))
            for i in range(len(self.cutoffs))
        )

    def init(self, key: Key[jax.Array, ""], unigram: Float[Array, " vocab"]) -> dict[str, Any]:
        """Random parameters, with biases at the unigram distribution.

        Args:
          key: key of the random numbers.
          unigram: ``[vocab]`` probabilities or counts, by which tokens are ranked.

        Returns:
          ``{"head", "head_bias", "tails": [{"down", "kernel", "bias"}], "order", "rank"}``;
          ``order`` (rank to token) and ``rank`` are int32 tables and not trained.

        >>> config = AdaptiveConfig(vocab_size=6, hidden_size=4, cutoffs=(2,))
        >>> params = jax.jit(lambda key: config.init(key, np.arange(6.0)))(jax.random.key(0))
        >>> params["order"].tolist(), params["head"].shape
        ([5, 4, 3, 2, 1, 0], (3, 4))
        """
        unigram = np.asarray(unigram, np.float64)
        order = np.argsort(-unigram, kind="stable").astype(np.int32)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        logs = np.log(np.maximum(unigram[order] / unigram.sum(), 1e-9))
        first = self.cutoffs[0]
        head_key, *keys = jax.random.split(key, 1 + len(self.cutoffs))
        width = self.hidden_size
        masses = [np.logaddexp.reduce(logs[a:b]) for a, b in self.tails]
        tails = []
        for key, (start, stop), narrow, mass in zip(keys, self.tails, self.widths, masses):
            down_key, kernel_key = jax.random.split(key)
            tails.append(
                {
                    "down": jax.random.normal(down_key, (width, narrow)) * width**-0.5,
                    "kernel": jax.random.normal(kernel_key, (stop - start, narrow)) * narrow**-0.5,
                    "bias": jnp.asarray(logs[start:stop] - mass, jnp.float32),
                }
            )
        return {
            "head": jax.random.normal(head_key, (first + len(tails), width)) * width**-0.5,
            "head_bias": jnp.asarray(np.concatenate([logs[:first], masses]), jnp.float32),
            "tails": tails,
            "order": jnp.asarray(order),
            "rank": jnp.asarray(rank),
        }

    def fit(
        self,
        rows: Float[Array, "vocab hidden"],
        unigram: Float[Array, " vocab"],
        hidden_mean: Float[Array, " hidden"],
        hidden_cov: Float[Array, "hidden hidden"],
    ) -> dict[str, Any]:
        """An adaptive softmax from a full head's rows.

        Frequent tokens keep their rows; a tail's entry in the head is the mean of its rows,
        weighted by frequency; inside a tail the rows less that mean are cut to the tail's width in
        the metric of the hidden states.

        Args:
          rows: ``[vocab, hidden]``.
          unigram: ``[vocab]``, probabilities or counts.
          hidden_mean: ``[hidden]``.
          hidden_cov: ``[hidden, hidden]``.

        Returns:
          Parameters as of `init`.

        >>> config = AdaptiveConfig(vocab_size=3, hidden_size=2, cutoffs=(1,), div_value=1)
        >>> fit = jax.jit(lambda rows: config.fit(rows, np.arange(3.0), np.zeros(2), np.eye(2)))
        >>> fit(np.eye(3, 2))["tails"][0]["kernel"].shape
        (2, 2)
        """
        params = self.init(jax.random.key(0), unigram)
        weights = np.maximum(np.asarray(unigram, np.float64) / np.sum(unigram), 0.01 / len(unigram))
        rows_ = jnp.asarray(rows, jnp.float32)[params["order"]]
        weights = jnp.asarray(weights, jnp.float32)[params["order"]]
        root, inverse = metric_roots(hidden_cov)
        mean = jnp.asarray(hidden_mean, jnp.float32)
        head, biases, tails = [rows_[: self.cutoffs[0]]], [jnp.zeros(self.cutoffs[0])], []
        for (start, stop), narrow in zip(self.tails, self.widths):
            part, weight = rows_[start:stop], weights[start:stop]
            centre = (part * weight[:, None]).sum(0) / weight.sum()
            mapped = (part - centre) @ root
            scale = jnp.sqrt(weight)
            _, vectors = jnp.linalg.eigh(jnp.einsum("vi,v,vj->ij", mapped, scale, mapped))
            best = vectors[:, ::-1][:, :narrow]
            kernel, down = mapped @ best, inverse @ best
            bias = (part - centre) @ mean - kernel @ (mean @ down)
            tails.append({"down": down, "kernel": kernel, "bias": bias})
            head.append(centre[None])
            # Logits of the tail are relative to the entry in the head: that one carries its mass.
            at_mean = logsumexp((part - centre) @ mean + jnp.zeros(stop - start))
            biases.append(at_mean[None])
        params |= {
            "head": jnp.concatenate(head),
            "head_bias": jnp.concatenate(biases),
            "tails": tails,
        }
        return params


def adaptive_nll(
    hidden: Float[Array, "*batch hidden"],
    params: dict[str, Any],
    labels: Int[Array, "*batch"],
    *,
    z_loss: float = 0.0,
    block_size: int = 128,
) -> Float[jax.Array, "*batch"]:
    """Cross-entropy of an adaptive softmax; a tail is computed only for labels that lie in it.

    Labels are sorted so that those of a tail lie together, and blocks without any are skipped. ::

        p(v) = p_head(v)                              v among the frequent tokens
               p_head(tail i) * p_tail_i(v)           otherwise

    Args:
      hidden: ``[*batch, hidden]``.
      params: parameters from `AdaptiveConfig.init`.
      labels: ``[*batch]``.
      z_loss: weight of the squared log-normaliser of the head.
      block_size: positions at a time in a tail.

    Returns:
      ``[*batch]``, float32, not reduced; nan where the label is outside the vocabulary.

    Raises:
      TypeError: ``hidden`` is not floating point or ``labels`` are not integers.
      ValueError: shapes that do not fit.

    >>> config = AdaptiveConfig(vocab_size=6, hidden_size=4, cutoffs=(2,))
    >>> params = jax.jit(lambda key: config.init(key, np.arange(1.0, 7.0)))(jax.random.key(0))
    >>> nll = jax.jit(adaptive_nll)(jnp.zeros((2, 4)), params, jnp.array([5, 0]))
    >>> print(np.exp(-np.asarray(nll)).round(3))
    [0.286 0.048]

    References:
      Grave et al., Efficient softmax approximation for GPUs, 2017 (arXiv:1609.04309).
    """
    checks.shapes(
        **{"params.head": (params["head"], "float entries hidden")},
        hidden=(hidden, "float *batch hidden"),
        labels=(labels, "int *batch"),
    )
    hidden, labels, rank = map(jnp.asarray, (hidden, labels, params["rank"]))
    batch = labels.shape
    known = (labels >= 0) & (labels < len(rank))
    flat, ranks = hidden.reshape(labels.size, hidden.shape[-1]), rank[labels].reshape(-1)
    logits = _affine(flat, params["head"], params["head_bias"])
    log_z = logsumexp(logits)
    first = params["head"].shape[0] - len(params["tails"])
    entry, start = jnp.minimum(ranks, first - 1), first
    nll = jnp.zeros(ranks.shape, log_z.dtype)
    if not ranks.size:
        return nll.reshape(batch)
    for i, tail in enumerate(params["tails"]):
        size = tail["kernel"].shape[0]
        here = (ranks >= start) & (ranks < start + size)
        entry = jnp.where(here, first + i, entry)
        nll = nll + _tail_nll(flat, ranks - start, here, tail, min(block_size, len(flat)))
        start += size
    nll = nll + log_z - gather_at(logits, entry[:, None])[:, 0]
    if z_loss:
        nll = nll + z_loss * log_z**2
    return jnp.where(known, nll.reshape(batch), jnp.nan)


def adaptive_log_probs(
    hidden: Float[Array, "*batch hidden"], params: dict[str, Any]
) -> Float[jax.Array, "*batch vocab"]:
    """All V log-probabilities, in the order of the tokens.

    >>> config = AdaptiveConfig(vocab_size=6, hidden_size=4, cutoffs=(2,))
    >>> params = jax.jit(lambda key: config.init(key, np.ones(6)))(jax.random.key(0))
    >>> log_probs = jax.jit(adaptive_log_probs)(jnp.ones((1, 4)), params)
    >>> print(f"{np.exp(log_probs).sum():.4f}")
    1.0000
    """
    hidden = jnp.asarray(hidden)
    head = jax.nn.log_softmax(_affine(hidden, params["head"], params["head_bias"]))
    first = params["head"].shape[0] - len(params["tails"])
    parts = [head[..., :first]]
    for i, tail in enumerate(params["tails"]):
        inside = jax.nn.log_softmax(_tail_logits(hidden, tail))
        parts.append(head[..., first + i, None] + inside)
    return jnp.take(jnp.concatenate(parts, axis=-1), params["rank"], axis=-1)


def adaptive_topk(hidden: Float[Array, "*batch hidden"], params: dict[str, Any], k: int) -> TopK:
    """The k most probable tokens; a tail is computed only if it could hold one of them.

    No token of a tail is more probable than the tail. This bound is exact. It saves the tails most
    of the time when one sequence is decoded; in a batch any row may need them.

    Args:
      hidden: ``[*batch, hidden]``.
      params: parameters from `AdaptiveConfig.init`.
      k: at most the number of frequent tokens.

    Returns:
      `TopK` of log-probabilities and tokens; its ``log_z`` is 0.

    Raises:
      ValueError: ``k`` is not in 1..frequent tokens.

    >>> config = AdaptiveConfig(vocab_size=6, hidden_size=4, cutoffs=(2,))
    >>> params = jax.jit(lambda key: config.init(key, np.arange(1.0, 7.0)))(jax.random.key(0))
    >>> jax.jit(adaptive_topk, static_argnums=2)(jnp.zeros((1, 4)), params, 2).indices
    Array([[5, 4]], dtype=int32)
    """
    checks.shapes(
        **{"params.head": (params["head"], "float entries hidden")},
        hidden=(hidden, "float *batch hidden"),
    )
    hidden = jnp.asarray(hidden)
    first = params["head"].shape[0] - len(params["tails"])
    if not 1 <= k <= first:
        raise ValueError(f"k: expected 1 to {first}, the frequent tokens, got {k}")
    head = jax.nn.log_softmax(_affine(hidden, params["head"], params["head_bias"]))
    values, ranks = lax.top_k(head[..., :first], k)
    start = first
    for i, tail in enumerate(params["tails"]):
        weight = head[..., first + i, None]

        def look(best: tuple, tail: Any = tail, weight: Any = weight, start: int = start) -> tuple:
            values, ranks = best
            inside, places = lax.top_k(
                jax.nn.log_softmax(_tail_logits(hidden, tail)), min(k, tail["bias"].shape[0])
            )
            values = jnp.concatenate([values, inside + weight], axis=-1)
            ranks = jnp.concatenate([ranks, places + start], axis=-1)
            values, places = lax.top_k(values, k)
            return values, jnp.take_along_axis(ranks, places, axis=-1)

        needed = (weight[..., 0] > values[..., -1]).any()
        values, ranks = lax.cond(needed, look, lambda best: best, (values, ranks))
        start += tail["kernel"].shape[0]
    return TopK(values, jnp.asarray(params["order"])[ranks], jnp.zeros(values.shape[:-1]))


class AdaptiveHead(VocabularyHead):
    """An adaptive softmax as a module, to be injected into a decoder.

    Its logits are log-probabilities.

    Args:
      config: sizes.
      unigram: ``[vocab]`` counts or probabilities, by which tokens are ranked.
      params: parameters from `AdaptiveConfig.fit`; random when omitted.
      dtype: compute dtype.
      rngs: source of the initial weights.

    >>> config = AdaptiveConfig(vocab_size=20, hidden_size=8, cutoffs=(4, 10))
    >>> make = lambda: AdaptiveHead(config, np.ones(20), rngs=nnx.Rngs(0))
    >>> nnx.jit(lambda hidden: make()(hidden))(np.ones((2, 8))).shape
    (2, 20)
    """

    def __init__(
        self,
        config: AdaptiveConfig,
        unigram: Float[Array, " vocab"],
        *,
        params: dict[str, Any] | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if params is None:
            params = config.init(rngs.params(), unigram)
        self.dtype = dtype
        self.head = nnx.Param(params["head"])
        self.head_bias = nnx.Param(params["head_bias"])
        self.tails = nnx.List([_Tail(**tail) for tail in params["tails"]])
        self.order = Assignment(params["order"])
        self.rank = Assignment(params["rank"])

    def params(self) -> dict[str, Any]:
        """What the functions take."""
        return {
            "head": self.head[...],
            "head_bias": self.head_bias[...],
            "tails": [
                {"down": t.down[...], "kernel": t.kernel[...], "bias": t.bias[...]}
                for t in self.tails
            ],
            "order": self.order[...],
            "rank": self.rank[...],
        }

    def __call__(
        self, hidden: Float[Array, "*batch hidden"], embedding: Array | None = None
    ) -> Float[jax.Array, "*batch vocab"]:
        return adaptive_log_probs(jnp.asarray(hidden, self.dtype), self.params())

    def nll(
        self,
        hidden: Float[Array, "*batch hidden"],
        labels: Int[Array, "*batch"],
        embedding: Array | None = None,
        *,
        z_loss: float = 0.0,
    ) -> Float[jax.Array, "*batch"]:
        """Cross-entropy, not reduced; see `adaptive_nll`."""
        hidden = jnp.asarray(hidden, self.dtype)
        return adaptive_nll(hidden, self.params(), labels, z_loss=z_loss)

    def top_k(
        self, hidden: Float[Array, "*batch hidden"], k: int, embedding: Array | None = None
    ) -> TopK:
        """The k largest log-probabilities; see `adaptive_topk`."""
        return adaptive_topk(jnp.asarray(hidden, self.dtype), self.params(), k)

    def as_linear(self, embedding: Array | None = None) -> Head:
        """Raises: a normaliser in each tail is not linear in the hidden state."""
        raise ValueError("head: expected one with a kernel, got an AdaptiveHead: use nll()")

    def cost(
        self,
        embedding: Array | None = None,
        *,
        looked_into: Sequence[float] | None = None,
        labels_in: Sequence[float] | None = None,
    ) -> HeadCost:
        """What it costs; see `HeadCost`.

        Args:
          embedding: not used.
          looked_into: how often decoding has to look into each tail; always when omitted.
          labels_in: how often a label lies in each tail; always when omitted.
        """
        always = [1.0] * len(self.tails)
        sizes = [t.down.size + t.kernel.size + t.bias.size for t in self.tails]
        head = self.head.size + self.head_bias.size
        parameters = head + sum(sizes)
        read = head + sum(size * often for size, often in zip(sizes, looked_into or always))
        train = head + sum(size * often for size, often in zip(sizes, labels_in or always))
        itemsize = self.head.dtype.itemsize
        return HeadCost(
            parameters=parameters,
            # With both tables between tokens and ranks.
            stored_bytes=parameters * itemsize + 2 * self.order.size * 4,
            read_bytes=int(read * itemsize),
            decode_flops=int(2 * read),
            train_flops=int(6 * train),
        )


class _Tail(nnx.Module):
    def __init__(self, down: Array, kernel: Array, bias: Array):
        self.down, self.kernel, self.bias = (nnx.Param(x) for x in (down, kernel, bias))


def _affine(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return (
        jnp.einsum(
            "...d,vd->...v", hidden, kernel.astype(hidden.dtype), preferred_element_type=wide
        )
        + bias
    )


def _tail_logits(hidden: jax.Array, tail: dict[str, Any]) -> jax.Array:
    return _affine(hidden @ tail["down"].astype(hidden.dtype), tail["kernel"], tail["bias"])


def _tail_nll(
    hidden: jax.Array, places: jax.Array, here: jax.Array, tail: dict[str, Any], block_size: int
) -> jax.Array:
    count, kind = len(here), jnp.promote_types(hidden.dtype, jnp.float32)
    blocks = -(-count // block_size)
    order = jnp.argsort(~here, stable=True)
    order = jnp.pad(order, (0, blocks * block_size - count), constant_values=count)
    order = order.reshape(blocks, block_size)

    def block(_: None, rows: jax.Array) -> tuple[None, jax.Array]:
        exists = here.at[rows].get(mode="fill", fill_value=False)

        def compute() -> jax.Array:
            logits = _tail_logits(hidden.at[rows].get(mode="fill", fill_value=0), tail)
            place = jnp.where(exists, places.at[rows].get(mode="fill", fill_value=0), 0)
            nll = logsumexp(logits) - jnp.take_along_axis(logits, place[:, None], axis=-1)[:, 0]
            return jnp.where(exists, nll, 0.0)

        return None, lax.cond(exists.any(), compute, lambda: jnp.zeros(block_size, kind))

    _, nll = lax.scan(jax.checkpoint(block), None, order)
    return jnp.zeros(count, kind).at[order.reshape(-1)].add(nll.reshape(-1), mode="drop")
