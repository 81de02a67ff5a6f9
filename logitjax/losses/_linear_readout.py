"""A few numbers per position of a linear head's logits, differentiable, without the logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax.losses._graph_statistics import GraphStatistics
from logitjax.losses.sweep._call import Branch, sweep, vocabulary_size
from logitjax.losses.sweep._statistics import ReadoutStatistic
from logitjax.ops import Array, AxisName, Number, TopK, finite_or_zero


class Readout(NamedTuple):
    """What `linear_readout` gives, float32; None for what was not asked.

    Attributes:
      log_z: `[*batch]` log-sum-exp of the logits.
      label_logit: `[*batch]` the logit at `labels`.
      gathered: `[*batch, n]` the logits at `ids`.
      statistics: `GraphStatistics` of the top k.
      cross_entropy: `[*batch]` of the labels; nan where a label is outside the vocabulary.
    """

    log_z: jax.Array
    label_logit: jax.Array | None = None
    gathered: jax.Array | None = None
    statistics: GraphStatistics | None = None
    cross_entropy: jax.Array | None = None

    def gathered_top_k(self, ids: Array) -> TopK:
        """`gathered` in the form that `sparse_kl_divergence` takes as its student."""
        if self.gathered is None:
            raise ValueError("gathered: ids were not given to linear_readout")
        return TopK(values=self.gathered, indices=jnp.asarray(ids), log_z=self.log_z)


def linear_readout(
    hidden: Float[Array, "*batch hidden"],
    head: Float[Array, "rows columns"],
    *,
    labels: Int[Array, "*batch"] | None = None,
    ids: Int[Array, "*batch n"] | None = None,
    top_k: int | None = None,
    bias: Float[Array, " vocab"] | None = None,
    vocab_axis: int | None = None,
    temperature: Number = 1.0,
    soft_cap: float | int | None = None,
    vocab_where: Bool[Array, " vocab"] | None = None,
    block_size: int | None = None,
    token_block: int | None = None,
    axis_name: AxisName | None = None,
) -> Readout:
    """Whatever several losses need of the logits, in one sweep over the vocabulary.

    A loss that is a function of a few numbers per position (the log-normaliser, the logits of the
    label or of a teacher's top tokens, the own top k with mean and deviation) can be written on top
    of this as if the logits were there: every float of the result is differentiable, and the
    backward pass is one more sweep however many of them are used.

    Args:
      hidden: `[*batch, hidden]`.
      head: `[hidden, vocab]` or `[vocab, hidden]`.
      labels: `[*batch]`; asks for `label_logit` and `cross_entropy`.
      ids: `[*batch, n]` vocabulary ids; asks for `gathered`.
      top_k: asks for `statistics` with so many entries, exact, ties lowest id first.
      bias: `[vocab]`.
      vocab_axis: the head's vocabulary axis; needed only for a square head.
      temperature: divides the logits.
      soft_cap: `cap tanh(logits / cap)`, before the temperature.
      vocab_where: `[vocab]` boolean: True for the entries that exist; the others are `-inf`.
      block_size: vocabulary entries a block; chosen from shape and backend by default.
      token_block: positions a block along the last batch axis; likewise.
      axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis: that axis;
        ids count over the whole vocabulary.

    Returns:
      `Readout`.

    Raises:
      ValueError: shapes do not fit, or `top_k` is not within the vocabulary.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.ones((4, 1)), jnp.array([[1.0, 3.0, 2.0]])
    >>> readout = linear_readout(hidden, head, labels=jnp.array([0, 1, 2, 0]), top_k=2)
    >>> print(readout.label_logit, readout.statistics.indices[0])
    [1. 3. 2. 1.] [1 2]
    """
    student = Branch(hidden, head, bias, vocab_axis, soft_cap)
    statistic, tokens, finish = _plan(student, labels, ids, top_k, axis_name)
    out = sweep(
        statistic,
        student,
        tokens=tokens,
        temperature=temperature,
        vocab_where=vocab_where,
        block_size=block_size,
        token_block=token_block,
        axis_name=axis_name,
    )
    return finish(out, tokens)


def linear_fused_loss(
    hidden: Float[Array, "*batch hidden"],
    head: Float[Array, "rows columns"],
    loss: Callable[[Readout, Any], jax.Array],
    tokens: Any,
    token_weights: Float[Array, "*batch"],
    *,
    labels: Int[Array, "*batch"] | None = None,
    ids: Int[Array, "*batch n"] | None = None,
    top_k: int | None = None,
    bias: Float[Array, " vocab"] | None = None,
    vocab_axis: int | None = None,
    temperature: Number = 1.0,
    soft_cap: float | int | None = None,
    vocab_where: Bool[Array, " vocab"] | None = None,
    block_size: int | None = None,
    token_block: int | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Float[jax.Array, ""], Readout]:
    """Any loss made of a `Readout`, summed over positions, with gradients formed in one sweep.

    What `linear_readout` followed by the loss gives, but a quarter cheaper: with the weights of the
    positions known, no logit is formed twice. The loss must treat positions apart, because it is
    called on a few of them at a time.

    ::

        sum(token_weights * loss(readout, tokens))

    Args:
      hidden: `[*batch, hidden]`.
      head: `[hidden, vocab]` or `[vocab, hidden]`.
      loss: `(readout, tokens) -> [*batch]`. It must not refer to traced arrays of its
        surroundings: what it needs comes through `tokens`.
      tokens: pytree of `[*batch, ...]` arrays, such as a teacher's `TopK`. Gets no gradient.
      token_weights: `[*batch]`; a position of weight 0 counts for nothing.
      labels: as in `linear_readout`, like all that follow.
      ids: `[*batch, n]`.
      top_k: number of entries.
      bias: `[vocab]`.
      vocab_axis: 0 or 1.
      temperature: divides the logits.
      soft_cap: of the logits.
      vocab_where: `[vocab]` boolean.
      block_size: vocabulary entries a block.
      token_block: positions a block.
      axis_name: mesh axis that splits the vocabulary.

    Returns:
      The scalar, and the `Readout` without a gradient, for metrics.

    Raises:
      ValueError: as `linear_readout`.

    >>> import jax, jax.numpy as jnp
    >>> from logitjax import losses
    >>> hidden, head = jnp.ones((4, 1)), jnp.array([[1.0, 3.0, 2.0]])
    >>> teacher = losses.graph_statistics(jnp.tile(jnp.array([1.0, 3.0, 2.0]), (4, 1)), 2).top_k
    >>> def half_and_half(readout, teacher):
    ...     student = readout.gathered_top_k(teacher.indices)
    ...     kl = losses.sparse_kl_divergence(student, teacher)
    ...     return 0.5 * readout.cross_entropy + 0.5 * kl
    >>> value, readout = linear_fused_loss(hidden, head, half_and_half, teacher, jnp.ones(4) / 4,
    ...                                    labels=jnp.array([1, 1, 1, 1]), ids=teacher.indices)
    >>> print(f"{value:.4f} {readout.cross_entropy.mean():.4f}")
    0.2038 0.4076
    """
    student = Branch(hidden, head, bias, vocab_axis, soft_cap)
    statistic, columns, finish = _plan(student, labels, ids, top_k, axis_name)

    def combine(out: Any, tokens: Any) -> jax.Array:
        return loss(finish(out, tokens), tokens["loss"])

    value, out = sweep(
        statistic,
        student,
        tokens=columns | {"loss": tokens},
        temperature=temperature,
        vocab_where=vocab_where,
        combine=combine,
        token_weights=token_weights,
        block_size=block_size,
        token_block=token_block,
        axis_name=axis_name,
    )
    return value, finish(out, columns)


def _plan(
    student: Branch,
    labels: Array | None,
    ids: Array | None,
    top_k: int | None,
    axis_name: AxisName | None,
) -> tuple[Callable[[Any], ReadoutStatistic], dict[str, Any], Callable[[Any, Any], Readout]]:
    """The statistic, what it reads of the positions, and what makes a `Readout` of its outputs."""
    vocab = vocabulary_size(student, axis_name)
    if top_k is not None and not 1 <= top_k <= vocab:
        raise ValueError(f"top_k must be between 1 and the vocabulary size {vocab}, got {top_k}")
    tokens = {}
    if labels is not None:
        tokens["labels"] = jnp.asarray(labels)
    if ids is not None:
        tokens["ids"] = jnp.asarray(ids)
    for name, value in tokens.items():
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {value.dtype}")

    def finish(out: Any, tokens: Any) -> Readout:
        statistics = entropy = None
        if top_k is not None:
            statistics = GraphStatistics(
                values=out.values,
                indices=out.indices,
                log_z=out.log_z,
                mean=out.mean,
                std=out.std,
                vocab_size=vocab,
            )
        if labels is not None:
            known = (tokens["labels"] >= 0) & (tokens["labels"] < vocab)
            entropy = jnp.where(known, finite_or_zero(out.log_z) - out.label, jnp.nan)
        return Readout(out.log_z, out.label, out.gathered, statistics, entropy)

    entries = 0 if ids is None else ids.shape[-1]
    statistic = functools.partial(_statistic, labels is not None, entries, top_k or 0)
    return statistic, tokens, finish


def _statistic(labels: bool, ids: int, k: int, dtype: Any) -> ReadoutStatistic:
    return ReadoutStatistic(labels=labels, ids=ids, k=k, moments=k > 0, dtype=dtype)
