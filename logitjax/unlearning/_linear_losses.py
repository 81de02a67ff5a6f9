"""Unlearning losses from hidden states, without the logits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from logitjax.losses._linear_readout import Readout, linear_fused_loss, linear_readout
from logitjax.losses.sweep._call import Branch, resolve_vocab_axis, sweep, vocabulary_size
from logitjax.losses.sweep._engine import Block
from logitjax.losses.sweep._statistics import KLStatistic
from logitjax.ops import Array, AxisName, finite_or_zero, masked_mean, psum


def linear_uniform_kl(
    hidden: Float[Array, "*batch hidden"],
    head: Float[Array, "rows columns"],
    *,
    bias: Float[Array, " vocab"] | None = None,
    vocab_axis: int | None = None,
    vocab_where: Bool[Array, " vocab"] | None = None,
    block_size: int | None = None,
    token_block: int | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*batch"]:
    """`uniform_kl` of a linear head's logits, which never exist as a whole.

    Only the log-normaliser needs the vocabulary: the mean logit is one product of the hidden state
    with the mean row of the head.

    ::

        log Z - (hidden . mean_v head_v + mean_v bias_v) - log V

    Args:
      hidden: ``[*batch, hidden]``, float32 or bfloat16.
      head: ``[hidden, vocab]`` or ``[vocab, hidden]``.
      bias: ``[vocab]``; entries at ``-inf`` do not exist.
      vocab_axis: the head's vocabulary axis; needed only for a square head.
      vocab_where: ``[vocab]`` boolean: True for the entries that exist.
      block_size: vocabulary entries a block; chosen from shape and backend by default.
      token_block: positions a block along the last batch axis; likewise.
      axis_name: inside `jax.shard_map` with the head's vocabulary split over this mesh axis: that
        axis.

    Returns:
      float32 ``[*batch]``.

    Raises:
      TypeError: arrays are not floating point.
      ValueError: shapes do not fit, or the head is square and ``vocab_axis`` is not given.

    >>> hidden, head = jnp.ones((2, 1)), jnp.array([[400.0, 0.0, 0.0]])
    >>> [f"{kl:.3f}" for kl in linear_uniform_kl(hidden, head)]
    ['265.568', '265.568']

    References:
      As `uniform_kl`.
    """
    readout = linear_readout(
        hidden,
        head,
        bias=bias,
        vocab_axis=vocab_axis,
        vocab_where=vocab_where,
        block_size=block_size,
        token_block=token_block,
        axis_name=axis_name,
    )
    mean, count = _mean_logit(Branch(hidden, head, bias, vocab_axis), vocab_where, axis_name)
    return finite_or_zero(readout.log_z) - mean - jnp.log(count)


def linear_undial(
    hidden: Float[Array, "*batch hidden"],
    head: Float[Array, "rows columns"],
    reference_hidden: Float[Array, "*batch reference_hidden"],
    reference_head: Float[Array, "reference_rows reference_columns"],
    labels: Int[Array, "*batch"],
    *,
    beta: float | int = 10.0,
    bias: Float[Array, " vocab"] | None = None,
    reference_bias: Float[Array, " vocab"] | None = None,
    vocab_axis: int | None = None,
    reference_vocab_axis: int | None = None,
    soft_cap: float | int | None = None,
    reference_soft_cap: float | int | None = None,
    vocab_where: Bool[Array, " vocab"] | None = None,
    token_weights: Float[Array, "*batch"] | None = None,
    block_size: int | None = None,
    token_block: int | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*losses"]:
    """`undial` of two linear heads' logits, neither of which exist as a whole.

    Args:
      hidden: ``[*batch, hidden]``.
      head: ``[hidden, vocab]`` or ``[vocab, hidden]``.
      reference_hidden: ``[*batch, reference_hidden]``, of the model before unlearning.
      reference_head: as ``head``. The reference gets no gradient.
      labels: ``[*batch]``, the tokens to forget.
      beta: how far their logit is lowered.
      bias: ``[vocab]``.
      reference_bias: ``[vocab]``.
      vocab_axis: the head's vocabulary axis; needed only for a square head.
      reference_vocab_axis: likewise.
      soft_cap: ``cap tanh(logits / cap)``.
      reference_soft_cap: likewise.
      vocab_where: ``[vocab]`` boolean: True for the entries that exist.
      token_weights: ``[*batch]``; gives the scalar ``sum(token_weights * loss)``, with gradients in
        the same sweep as the value.
      block_size: vocabulary entries a block.
      token_block: positions a block.
      axis_name: mesh axis that splits the vocabulary.

    Returns:
      float32 ``[*batch]``, or a scalar with ``token_weights``; nan where the label is outside the
      vocabulary.

    Raises:
      TypeError: arrays are not floating point or labels not integers.
      ValueError: shapes do not fit.

    >>> one, head = jnp.ones((1, 1)), jnp.zeros((1, 4))
    >>> linear_undial(one, head, one, head, jnp.array([2])).round(4)
    Array([1.3863], dtype=float32)

    References:
      As `undial`.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    student = Branch(hidden, head, bias, vocab_axis, soft_cap)
    loss = sweep(
        functools.partial(_lowered, float(beta)),
        student,
        Branch(
            reference_hidden,
            reference_head,
            reference_bias,
            reference_vocab_axis,
            reference_soft_cap,
            "reference_",
        ),
        tokens={"labels": labels},
        vocab_where=vocab_where,
        combine=_KnownLabels(vocab=vocabulary_size(student, axis_name)),
        token_weights=token_weights,
        block_size=block_size,
        token_block=token_block,
        axis_name=axis_name,
    )
    return loss if token_weights is None else loss[0]


def linear_assistant_objective(
    hidden: Float[Array, "*batch hidden"],
    head: Float[Array, "rows columns"],
    labels: Int[Array, "*batch"],
    retain: Bool[Array, "*batch"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    retain_weight: float | int = 6.5,
    bias: Float[Array, " vocab"] | None = None,
    vocab_axis: int | None = None,
    vocab_where: Bool[Array, " vocab"] | None = None,
    block_size: int | None = None,
    token_block: int | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """`assistant_objective` from hidden states: both halves in one sweep over the head.

    The rows to forget and to keep lie in one batch, which the assistant runs once; the gradient is
    formed in the same sweep as the value.

    ::

        mean_{forget} (log Z - logit_y) + beta mean_{retain} (log Z - mean_v logit_v - log V)

    Args:
      hidden: ``[*batch, hidden]``, of the assistant.
      head: ``[hidden, vocab]`` or ``[vocab, hidden]``.
      labels: ``[*batch]``; those of retain positions are not looked at.
      retain: ``[*batch]``, True for positions of the data to keep.
      where: ``[*batch]``, positions that count; all when None. The release counts all of the data
        to keep, and the answers of the data to forget.
      retain_weight: beta.
      bias: ``[vocab]``.
      vocab_axis: the head's vocabulary axis; needed only for a square head.
      vocab_where: ``[vocab]`` boolean: True for the entries that exist.
      block_size: vocabulary entries a block.
      token_block: positions a block.
      axis_name: mesh axis that splits the vocabulary.

    Returns:
      The float32 scalar, and both means: ``{"forget", "retain"}``, without a gradient.

    Raises:
      TypeError: arrays are not floating point.
      ValueError: shapes do not fit.

    >>> hidden, head = jnp.ones((4, 1)), jnp.array([[2.0, 0.0, 0.0]])
    >>> retain = jnp.array([False, False, True, True])
    >>> labels = jnp.array([0, 0, -100, -100])
    >>> loss, means = linear_assistant_objective(hidden, head, labels, retain)
    >>> print(f"{loss:.4f} {means['forget']:.4f} {means['retain']:.4f}")
    3.3223 0.2395 0.4743

    References:
      As `assistant_objective`.
    """
    retain = jnp.asarray(retain)
    counts = jnp.ones(retain.shape, bool) if where is None else jnp.asarray(where)
    sides = {"forget": counts & ~retain, "retain": counts & retain}
    shares = {name: 1.0 / jnp.maximum(side.sum(), 1) for name, side in sides.items()}
    token_weights = jnp.where(sides["forget"], shares["forget"], 0.0)
    token_weights += jnp.where(sides["retain"], retain_weight * shares["retain"], 0.0)
    total, readout = linear_fused_loss(
        hidden,
        head,
        _known_or_normaliser,
        retain,
        token_weights,
        labels=labels,
        bias=bias,
        vocab_axis=vocab_axis,
        vocab_where=vocab_where,
        block_size=block_size,
        token_block=token_block,
        axis_name=axis_name,
    )
    mean, count = _mean_logit(Branch(hidden, head, bias, vocab_axis), vocab_where, axis_name)
    floor = mean + jnp.log(count)
    loss = total - jnp.where(sides["retain"], token_weights * floor, 0.0).sum()
    assert readout.cross_entropy is not None
    means = {
        "forget": masked_mean(readout.cross_entropy, sides["forget"]),
        "retain": masked_mean(finite_or_zero(readout.log_z) - floor, sides["retain"]),
    }
    return loss, lax.stop_gradient(means)


def _known_or_normaliser(readout: Readout, retain: jax.Array) -> jax.Array:
    assert readout.cross_entropy is not None
    return jnp.where(retain, finite_or_zero(readout.log_z), readout.cross_entropy)


def _mean_logit(
    branch: Branch, vocab_where: Array | None, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array]:
    """Mean over the vocabulary of every position's logits, and the number of entries."""
    axis = resolve_vocab_axis(branch)
    head = jnp.asarray(branch.head)
    wide = jnp.promote_types(head.dtype, jnp.float32)
    exists = jnp.ones(head.shape[axis], bool) if vocab_where is None else jnp.asarray(vocab_where)
    bias = None
    if branch.bias is not None:
        bias = jnp.asarray(branch.bias).astype(wide)
        exists = exists & (bias > -jnp.inf)
    count = jnp.maximum(psum(exists.sum(), axis_name), 1).astype(wide)
    rows = (
        head if vocab_where is None and bias is None else jnp.where(_along(exists, axis), head, 0)
    )
    row = psum(rows.sum(axis, dtype=wide), axis_name) / count
    hidden = jnp.asarray(branch.hidden).astype(wide)
    mean = jnp.einsum("...h,h->...", hidden, row, precision=lax.Precision.HIGHEST)
    if bias is not None:
        mean = mean + psum(jnp.where(exists, bias, 0.0).sum(), axis_name) / count
    return mean, count


def _along(values: jax.Array, axis: int) -> jax.Array:
    return values[:, None] if axis == 0 else values[None, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LoweredStatistic(KLStatistic):
    """Cross-entropy from a teacher whose logit at the label is lowered by ``strength``."""

    strength: float

    def absorb(self, state, block: Block, passed: Any):
        over, under = self._sides(block)
        both = (over > -jnp.inf) & (under > -jnp.inf)
        logit = jnp.where(both, -under, 0.0)
        return state[0].add(over, logit, jnp.where(both, 0.0, 1.0)), state[1].add(under)

    def finish(self, state, passed: Any):
        value, residuals = super().finish(state, passed)
        # The divergence's terms hold no teacher logits here, so its normaliser has to go as well.
        return value + residuals[3] * residuals[0], residuals

    def _sides(self, block: Block) -> tuple[jax.Array, jax.Array]:
        assert block.teacher is not None
        hit = block.columns == block.tokens["labels"][..., None]
        return block.teacher - jnp.where(hit, self.strength, 0.0), block.student


def _lowered(strength: float, dtype: Any) -> _LoweredStatistic:
    return _LoweredStatistic(strength=strength, dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KnownLabels:
    vocab: int

    def __call__(self, outputs: jax.Array, tokens: Any) -> jax.Array:
        labels = tokens["labels"]
        return jnp.where((labels >= 0) & (labels < self.vocab), outputs, jnp.nan)
