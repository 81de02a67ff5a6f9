import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from logitjax.losses.sweep import Blocks, Head, LogitBlock, ReadoutStatistic, run
from logitjax.ops import Array, AxisName, Number, checks, neginf_to_zero


class LogProbs(NamedTuple):
    """Results of `linear_log_probs`, both `[*batch]`, float32 and differentiable.

    Attributes:
        values: Log-probabilities of the tokens, in nats.
        entropy: Entropies of the distributions they are drawn from; None if not requested.
    """

    values: jax.Array
    entropy: Any = None


def linear_log_probs(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    tokens: Int[Array, "*batch"],
    *,
    temperature: Number = 1.0,
    support: Int[Array, "*batch n"] | None = None,
    entropy: bool = False,
    vocab_where: Bool[Array, " vocab"] | None = None,
    blocks: Blocks | None = None,
    axis_name: AxisName | None = None,
) -> LogProbs:
    """Compute log-probabilities for policy-gradient losses, without holding the logits.

    One sweep over the vocabulary gives both results and another one their gradient. The
    distribution must match that of the sampler's log-probabilities to compare with:

    | vLLM's `logprobs_mode`  | here                                                              |
    |-------------------------|-------------------------------------------------------------------|
    | `raw_logprobs`          | temperature 1 and no support, however the token was drawn         |
    | `processed_logprobs`    | the temperature, and the ids that top-k, top-p and min-p keep     |
    | `raw_logits`,           | no log-probabilities: `linear_readout` has `label_logit`          |
    | `processed_logits`      |                                                                   |

    The sampler of tunix divides by the temperature and normalises over the whole vocabulary, even
    if it truncates the distribution. Penalties and biases that differ between positions are not
    supported. Values, entropy and gradient are::

        log p_y = z_y - log sum_{v in S} exp z_v,    H = -sum_{v in S} p_v log p_v,
        d z_v   = g (1[v = y] - p_v) - e p_v (log p_v + H)    for cotangents g, e

    See `logitjax.losses` for what all losses take and raise.

    Args:
        tokens: `[*batch]` ids in the whole vocabulary, which the positions of `hidden` predict.
        support: The sets `S` that the sampler recorded: `[*batch, n]` ids, padded with -1 (see
            `pad_support`). A token that is missing in its set is added, a repeated id counts once,
            and an empty set stands for the whole vocabulary. Sets recomputed from the trained
            model's logits would differ by rounding, and later by training.

    Returns:
        `LogProbs`; `-inf` if the token's entry is not valid, nan if an id is outside the
        vocabulary.

    >>> import jax, numpy as np
    >>> hidden, head = np.ones((2, 1)), np.array([[1.0, 2.0, 3.0, 0.0]])
    >>> support = np.array([[0, 1, 2], [-1, -1, -1]])
    >>> read = jax.jit(linear_log_probs, static_argnames="entropy")
    >>> read(hidden, head, np.array([2, 2]), support=support, entropy=True)
    LogProbs(values=Array([-0.4076..., -0.4401...], dtype=float32),
             entropy=Array([0.8323..., 0.9475...], dtype=float32))

    References:
        DeepSeek-V3.2, 2025 (arXiv 2512.02556), section 3.1, for the sampler's sets.
    """
    checks.shapes(hidden=(hidden, "float *batch hidden"), tokens=(tokens, "int *batch"))
    hidden, tokens = jnp.asarray(hidden), jnp.asarray(tokens)
    head = Head.of(head).resolve(hidden.shape[-1])
    # No ids: the whole vocabulary.
    ids = jnp.zeros((*tokens.shape, 0), jnp.int32)
    if support is not None:
        ids = _with_tokens(support, tokens)
    statistic = _LogProbs(
        labels=True, ids=ids.shape[-1], vocab=head.vocab_size(axis_name), entropy=entropy
    )
    return run(
        statistic,
        hidden,
        head,
        tokens={"labels": tokens, "ids": ids},
        temperature=temperature,
        vocab_where=vocab_where,
        blocks=blocks,
        axis_name=axis_name,
    )


def pad_support(ids: Array, row_splits: Array, batch: tuple[int, ...]) -> np.ndarray:
    """Lay out a flat list of sets of ids as `[*batch, n]`, padded with -1.

    Args:
        ids: `[total]`, the concatenated sets.
        row_splits: `[positions + 1]`, start of each set and the end. It cannot be traced, because
            the largest set determines `n`.

    Raises:
        ValueError: The splits do not fit the positions and ids.

    >>> pad_support(np.array([5, 7, 2]), np.array([0, 2, 2, 3]), (3,)).tolist()
    [[5, 7], [-1, -1], [2, -1]]
    """
    ids, splits = np.asarray(ids), np.asarray(row_splits)
    counts, size = np.diff(splits), int(np.prod(batch)) + 1
    complete = splits.shape == (size,) and (splits[0], splits[-1]) == (0, ids.size)
    if not complete or (counts < 0).any():
        expected = f"{size} ascending numbers from 0 to {ids.size}"
        raise ValueError(f"row_splits: expected {expected}, got {splits}")
    present = np.arange(max(counts.max(initial=0), 1)) < counts[:, None]
    padded = np.full(present.shape, -1, np.int32)
    padded[present] = ids
    return padded.reshape(*batch, -1)


def _with_tokens(support: Any, tokens: jax.Array) -> jax.Array:
    """Add tokens to their sets, each id once and the rest -1; empty sets remain empty."""
    checks.shapes(tokens=(tokens, "int *batch"), support=(support, "int *batch n"))
    ids = jnp.asarray(support).astype(jnp.int32)
    tokens = jnp.where((ids >= 0).any(-1), tokens.astype(jnp.int32), -1)
    # Sorting makes repeated ids adjacent and puts every -1 first.
    ids = jnp.sort(jnp.concatenate([ids, tokens[..., None]], -1), -1)
    repeated = jnp.concatenate([ids[..., :1] < 0, ids[..., 1:] == ids[..., :-1]], -1)
    return jnp.where(repeated, -1, ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LogProbs(ReadoutStatistic):
    """Statistic whose losses are `LogProbs`; adds a sum for the entropy."""

    vocab: int
    entropy: bool

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        return super().start(batch, dtype, passed), jnp.zeros(batch, dtype)

    def absorb(self, state: Any, block: LogitBlock, passed: Any) -> Any:
        read, z = super().absorb(state[0], block, passed), block.student
        if not self.entropy:
            return read, state[1]
        # The sum of exp(z - peak) (z - peak) does not cancel for logits far from zero.
        off = z - read.sums.peak[..., None]
        more = jnp.exp(off) * jnp.where(z != -jnp.inf, off, 0.0)
        return read, _about(read.sums.peak, state) + more.sum(-1)

    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        read = super().reduce(state[0], axis_name, passed)
        return read, lax.psum(_about(read.sums.peak, state), axis_name)

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        outputs, residuals = super().finish(state[0], passed)
        # Rows may have no valid entry.
        total = jnp.maximum(state[0].sums.sums[0], 1e-30)
        entropy = jnp.log(total) - state[1] / total
        return (outputs, entropy), (residuals, entropy)

    def gradient(self, residuals: Any, cotangents: Any, block: LogitBlock) -> jax.Array:
        read, entropy = residuals
        total = super().gradient(read, cotangents[0], block)
        if not self.entropy:
            return total
        log_p = block.student - neginf_to_zero(read[0].log_z)[..., None]
        slope = jnp.where(block.student != -jnp.inf, log_p, 0.0) + entropy[..., None]
        # dH/dz = -p (log p + H)
        return total - cotangents[1][..., None] * jnp.exp(log_p) * slope

    def losses(self, outputs: Any, tokens: Any) -> LogProbs:
        read, entropy = outputs
        values = read.label - neginf_to_zero(read.log_z)
        if self.ids:
            ids = tokens["ids"]
            # An empty set stands for the whole vocabulary.
            recorded = (ids >= 0).any(-1)
            z = jnp.where(ids < 0, -jnp.inf, jnp.where(ids < self.vocab, read.gathered, jnp.nan))
            z = jnp.where(recorded[..., None], z, 0.0)
            log_z = neginf_to_zero(jax.nn.logsumexp(z, -1))
            values = jnp.where(recorded, read.label - log_z, values)
            log_p = z - log_z[..., None]
            terms = jnp.exp(log_p) * jnp.where(log_p != -jnp.inf, log_p, 0.0)
            entropy = jnp.where(recorded, -terms.sum(-1), entropy)
        existing = (tokens["labels"] >= 0) & (tokens["labels"] < self.vocab)
        return LogProbs(jnp.where(existing, values, jnp.nan), entropy if self.entropy else None)


def _about(peak: jax.Array, state: Any) -> jax.Array:
    """Shift the state's sum for the entropy to another peak."""
    (sums, *_), spread = state
    apart = sums.peak - peak
    return jnp.exp(apart) * (spread + apart * sums.sums[0])
