"""Adaptive softmax: frequent tokens in full, rare ones in narrow tails.

Grave et al., Efficient softmax approximation for GPUs, 2017 (arXiv:1609.04309).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax import heads, ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """Sizes of an adaptive softmax.

    Attributes:
        vocab_size: V.
        hidden_size: d.
        cutoffs: Ranks by frequency at which a tail begins: `(2000, 10000)` keeps 2,000 tokens in
            the head and makes two tails.
        div_value: Tail i is `hidden_size / div_value ** (i + 1)` wide, rounded down, at least 1.
    """

    vocab_size: int
    hidden_size: int
    cutoffs: tuple[int, ...]
    div_value: float = 4.0

    @property
    def tails(self) -> tuple[tuple[int, int], ...]:
        return tuple(zip(self.cutoffs, (*self.cutoffs[1:], self.vocab_size)))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(
            max(1, int(self.hidden_size / self.div_value ** (i + 1)))
            for i in range(len(self.cutoffs))
        )

    def init(self, key: jax.Array, unigram: Any) -> dict[str, Any]:
        """Random parameters, with biases at the unigram distribution `[vocab]`.

        `order` (rank to token) and `rank` are int32 tables and not trained.
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

    def fit(self, rows: Any, unigram: Any, hidden_mean: Any, hidden_cov: Any) -> dict[str, Any]:
        """An adaptive softmax from the rows `[vocab, hidden]` of a full head.

        Frequent tokens keep their rows; a tail's entry in the head is the mean of its rows,
        weighted by frequency; inside a tail the rows less that mean are cut to the tail's width in
        the metric of the hidden states.
        """
        params = self.init(jax.random.key(0), unigram)
        weights = np.maximum(np.asarray(unigram, np.float64) / np.sum(unigram), 0.01 / len(unigram))
        rows_ = jnp.asarray(rows, jnp.float32)[params["order"]]
        weights = jnp.asarray(weights, jnp.float32)[params["order"]]
        root, inverse = _metric_roots(hidden_cov)
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
            # Logits of the tail are relative to the entry in the head, which carries its mass.
            at_mean = ops.logsumexp((part - centre) @ mean + jnp.zeros(stop - start))
            biases.append(at_mean[None])
        params |= {
            "head": jnp.concatenate(head),
            "head_bias": jnp.concatenate(biases),
            "tails": tails,
        }
        return params


def adaptive_nll(hidden: Any, params: dict[str, Any], labels: Any) -> jax.Array:
    """Cross-entropy `[*batch]`."""
    ranks = jnp.asarray(params["rank"])[jnp.asarray(labels)]
    return -ops.gather_at(log_probs(hidden, params), ranks[..., None])[..., 0]


def adaptive_topk(hidden: Any, params: dict[str, Any], k: int) -> jax.Array:
    """The k most probable tokens."""
    return jnp.asarray(params["order"])[ops.top_k(log_probs(hidden, params), k)[1]]


def log_probs(hidden: Any, params: dict[str, Any]) -> jax.Array:
    """Log-probabilities of all tokens by frequency, `[*batch, vocab]`. ::

    p(v) = p_head(v)                              v among the frequent tokens
           p_head(tail i) * p_tail_i(v)           otherwise
    """
    hidden, tails = jnp.asarray(hidden), params["tails"]
    head = jax.nn.log_softmax(_affine(hidden, params["head"], params["head_bias"]))
    first = head.shape[-1] - len(tails)
    parts = [head[..., :first]]
    for i, tail in enumerate(tails):
        logits = _affine(hidden @ tail["down"], tail["kernel"], tail["bias"])
        parts.append(head[..., first + i, None] + jax.nn.log_softmax(logits))
    return jnp.concatenate(parts, axis=-1)


def adaptive_cost(params: dict[str, Any], tables: dict[str, Any]) -> heads.HeadCost:
    """Return its cost if every tail is computed."""
    size, itemsize = sum(x.size for x in jax.tree.leaves(params)), params["head"].dtype.itemsize
    return heads.HeadCost(
        parameters=size,
        stored_bytes=size * itemsize + 2 * tables["order"].size * 4,
        read_bytes=size * itemsize,
        decode_flops=2 * size,
        train_flops=6 * size,
    )


def _metric_roots(cov: Any) -> tuple[jax.Array, jax.Array]:
    """The square root of a covariance and its inverse; tiny eigenvalues are lifted."""
    values, vectors = jnp.linalg.eigh(jnp.asarray(cov, jnp.float32))
    values = jnp.sqrt(jnp.maximum(values, 1e-6 * values[-1]))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def _affine(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.einsum("...d,vd->...v", hidden, kernel) + bias
