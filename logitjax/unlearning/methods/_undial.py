"""UNDIAL: self-distillation with the logit of the memorised token lowered."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from logitjax.losses import Blocks, Head, kl_divergence
from logitjax.losses.sweep import KLStatistic, LogitBlock, run
from logitjax.ops import Array, AxisName, Number, checks, log_softmax, psum
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read


def undial(
    logits: Float[Array, "*batch vocab"],
    reference_logits: Float[Array, "*batch vocab"],
    labels: Int[Array, "*batch"],
    *,
    beta: Number = 10.0,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*batch"]:
    """UNDIAL: distils the model from itself with the logit of the memorised token lowered.

    ::

        cross-entropy( softmax(reference - beta onehot(y)), softmax(logits) )

    Args:
        logits: `[*batch, vocab]`.
        reference_logits: the same shape, of the model before unlearning; no gradient.
        labels: `[*batch]`, the tokens to forget.
        beta: how far their logit is lowered.
        vocab_where: boolean, broadcastable to the logits: True for the entries that exist.
        axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis: that axis;
            labels count over the whole vocabulary.

    Returns:
        float32 `[*batch]`; nan where the label is outside the vocabulary, as in `cross_entropy`.

    Raises:
        TypeError: logits are not floating point or labels not integers.
        ValueError: different shapes.

    >>> jax.jit(undial)(jnp.zeros((1, 4)), jnp.zeros((1, 4)), jnp.array([2]))
    Array([1.386294...], dtype=float32)

    References:
        Dong et al., UNDIAL, 2024 (arXiv 2402.10052). OpenUnlearning's `UNDIAL` (beta 10, no retain
        loss) averages over all positions and lets a label of -100 name the token V - 100; here such
        labels give nan, for the caller's mask to leave out.
    """
    logits = checks.as_float(logits, "logits")
    reference = lax.stop_gradient(checks.as_float(reference_logits, "reference_logits"))
    checks.same_shape(logits, reference, "logits", "reference_logits")
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: expected shape {logits.shape[:-1]}, got {labels.shape}")
    vocab, first, size = logits.shape[-1], 0, logits.shape[-1]
    if axis_name is not None:
        first, size = lax.axis_index(axis_name) * vocab, lax.axis_size(axis_name) * vocab
    hit = jnp.arange(vocab) + first == labels[..., None]
    target = jnp.where(hit, reference - beta, reference)
    log_t = log_softmax(target, vocab_where=vocab_where, axis_name=axis_name)
    t = jnp.exp(log_t)
    entropy = -psum(jnp.where(t > 0, t * log_t, 0.0).sum(-1), axis_name)
    loss = kl_divergence(logits, target, vocab_where=vocab_where, axis_name=axis_name) + entropy
    return jnp.where((labels >= 0) & (labels < size), loss, jnp.nan)


def linear_undial(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    reference_hidden: Float[Array, "*batch reference_hidden"],
    reference_head: Head | Float[Array, "reference_rows reference_columns"],
    labels: Int[Array, "*batch"],
    *,
    beta: float | int = 10.0,
    vocab_where: Bool[Array, " vocab"] | None = None,
    weights: Float[Array, "*batch"] | None = None,
    blocks: Blocks | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*losses"]:
    """`undial` of two linear heads' logits, neither of which exist as a whole.

    The other arguments and errors are those of `losses.linear_kl_divergence`.

    Args:
        labels: `[*batch]`, the tokens to forget.
        beta: how far their logit is lowered.
        weights: `[*batch]`; gives the scalar `sum(weights * loss)`, with gradients in the same
            sweep as the value.

    Returns:
        float32 `[*batch]`, or a scalar with `weights`; nan where the label is outside the
        vocabulary.

    >>> import numpy as np
    >>> one, head = np.ones((1, 1), np.float32), np.zeros((1, 4), np.float32)
    >>> print(f"{jax.jit(linear_undial)(one, head, one, head, np.array([2]))[0]:.4f}")
    1.3863

    References:
        As `undial`.
    """
    checks.shapes(
        hidden=(hidden, "float *batch hidden"),
        labels=(labels, "int *batch"),
        reference_hidden=(reference_hidden, "float *batch reference"),
    )
    hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
    head = Head.of(head).resolve(hidden.shape[-1])
    before = Head.of(reference_head).resolve(jnp.shape(reference_hidden)[-1], "reference_head")
    loss = run(
        _Undial(strength=float(beta), vocab=head.vocab_size(axis_name)),
        hidden,
        head,
        teacher=(reference_hidden, before),
        tokens={"labels": labels},
        vocab_where=vocab_where,
        weights=weights,
        blocks=blocks,
        axis_name=axis_name,
    )
    return loss if weights is None else loss[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Undial(KLStatistic):
    """Cross-entropy from a teacher whose logit at the label is lowered by `strength`."""

    strength: float
    vocab: int

    def term(self, over: jax.Array, under: jax.Array) -> jax.Array:
        return -under

    def sides(self, block: LogitBlock) -> tuple[jax.Array, jax.Array]:
        assert block.teacher is not None
        hit = block.columns == block.tokens["labels"][..., None]
        return block.teacher - jnp.where(hit, self.strength, 0.0), block.student

    def losses(self, outputs: Any, tokens: Any) -> jax.Array:
        labels = tokens["labels"]
        return jnp.where((labels >= 0) & (labels < self.vocab), outputs, jnp.nan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNDIAL(TwoSided):
    """Self-distillation from the model before, with the memorised token's logit lowered.

    Attributes:
        beta: How far it is lowered.
    """

    beta: float = 10.0

    peak = 3e-2
    reads = (Need("forget", "states"), Need("forget", "states", before=True))

    def forget(self, read: Read) -> Any:
        values = linear_undial(
            read.states("forget"),
            read.head(),
            read.states("forget", before=True),
            read.head(before=True),
            read.labels("forget"),
            beta=self.beta,
        )
        return read.put("forget", values), read.where("forget")
