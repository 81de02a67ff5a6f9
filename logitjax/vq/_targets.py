"""An old head's outputs on cached hidden states, in a form that makes tuning a new head cheap."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from absl import logging
from jaxtyping import Float

from logitjax.losses import Head
from logitjax.ops import Array, logsumexp, soft_cap, top_k


@dataclasses.dataclass(frozen=True)
class HeadTargets:
    """Expectations of a full head over cached hidden states.

    A VQ head's cross-entropy against the full one is linear in codebook and biases except for its
    own normaliser: tuning needs sums, and large probabilities to reduce the noise of mini-batches.

    Attributes:
        sums, counts: ``[vocab, hidden]`` and ``[vocab]``, ``sum_n p(v | h_n) h_n`` and without h.
        top_probs, top_tokens: ``[count, k]``, the largest probabilities of each position.
        rest_sums, rest_counts: those sums without the top ones.
        entropy: mean entropy of the full head, nats.
        nll: ``[count]``, the full head's own loss on the labels, if these were given.
    """

    sums: np.ndarray
    counts: np.ndarray
    top_probs: np.ndarray
    top_tokens: np.ndarray
    rest_sums: np.ndarray
    rest_counts: np.ndarray
    entropy: float
    nll: np.ndarray

    def with_top(self, top: int, hidden: Float[Array, "count hidden"]) -> "HeadTargets":
        """The same expectations with fewer top tokens per position."""
        probs, tokens = self.top_probs[:, :top], self.top_tokens[:, :top]
        sums, counts = _rest(self.sums, self.counts, probs, tokens, hidden)
        return dataclasses.replace(
            self, top_probs=probs, top_tokens=tokens, rest_sums=sums, rest_counts=counts
        )


def head_targets(
    hidden: Float[Array, "count hidden"],
    head: Head,
    *,
    labels: Any = None,
    top: int = 64,
    block_size: int = 512,
) -> HeadTargets:
    """Run the full head once over cached hidden states; O(N V d), the only use of it."""
    rows = jnp.asarray(head.rows, jnp.float32)
    vocab, width = rows.shape
    top = min(top, vocab)
    bias = jnp.zeros(vocab) if head.bias is None else jnp.asarray(head.bias, jnp.float32)
    labels = np.zeros(len(hidden), np.int32) if labels is None else np.asarray(labels)

    # `[vocab, hidden]` sums in place.
    @jax.jit(donate_argnums=(0, 1))
    def add(
        sums: Any, counts: Any, rows: Any, bias: Any, hidden: Any, labels: Any, exists: Any
    ) -> Any:
        logits = hidden @ rows.T + bias
        if head.soft_cap is not None:
            logits = soft_cap(logits, head.soft_cap)
        log_z = logsumexp(logits)
        # Padding does not count.
        probs = jnp.exp(logits - log_z[:, None]) * exists[:, None]
        values, tokens = top_k(logits, top)
        # 0 times -inf is nan.
        entropy = log_z - (probs * jnp.maximum(logits, -1e30)).sum(-1)
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        out = (jnp.exp(values - log_z[:, None]), tokens, entropy, log_z - chosen)
        return sums + probs.T @ hidden, counts + probs.sum(0), out

    sums, counts, parts = jnp.zeros((vocab, width)), jnp.zeros(vocab), []
    block_size = min(block_size, len(hidden))
    for start in range(0, len(hidden), block_size):
        block = np.asarray(hidden[start : start + block_size], np.float32)
        here = len(block)
        pad = block_size - here
        block = np.pad(block, ((0, pad), (0, 0)))
        label = np.pad(labels[start : start + block_size], (0, pad))
        # The last block is padded.
        exists = np.arange(block_size) < here
        sums, counts, out = add(sums, counts, rows, bias, block, label, exists)
        parts.append([np.asarray(x)[:here] for x in out])
        if start // block_size % 20 == 0:
            logging.info("full head: %d of %d positions", start + here, len(hidden))
    probs, tokens, entropy, nll = (np.concatenate(x) for x in zip(*parts))
    sums, counts = np.asarray(sums), np.asarray(counts)
    rest_sums, rest_counts = _rest(sums, counts, probs, tokens, hidden)
    return HeadTargets(
        sums=sums,
        counts=counts,
        top_probs=probs,
        top_tokens=tokens,
        rest_sums=rest_sums,
        rest_counts=rest_counts,
        entropy=float(entropy.mean()),
        nll=nll,
    )


def _rest(
    sums: np.ndarray, counts: np.ndarray, probs: np.ndarray, tokens: np.ndarray, hidden: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The part of expected sums and counts outside the top tokens of each position."""
    count, top = probs.shape
    places = np.repeat(np.arange(count), top)
    kept = scipy.sparse.csr_matrix(
        (probs.reshape(-1), (tokens.reshape(-1), places)), shape=(len(counts), count)
    )
    # Sparse: few of V per position.
    rest = sums - kept @ np.asarray(hidden, np.float32)
    return rest, counts - np.asarray(kept.sum(1))[:, 0]
