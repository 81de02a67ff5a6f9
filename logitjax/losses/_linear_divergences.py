"""Divergences between a student's and a teacher's linear head, without the logits of either."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from logitjax.losses.sweep._call import Branch, sweep
from logitjax.losses.sweep._statistics import (
    JensenShannonStatistic,
    KLStatistic,
    TotalVariationStatistic,
)
from logitjax.ops import Array, AxisName, Number, check_between


def linear_kl_divergence(
    hidden: Float[Array, "*batch hidden"],
    head: Float[Array, "rows columns"],
    teacher_hidden: Float[Array, "*batch teacher_hidden"],
    teacher_head: Float[Array, "teacher_rows teacher_columns"],
    *,
    direction: Literal["forward", "reverse"] = "forward",
    bias: Float[Array, " vocab"] | None = None,
    teacher_bias: Float[Array, " vocab"] | None = None,
    vocab_axis: int | None = None,
    teacher_vocab_axis: int | None = None,
    temperature: Number = 1.0,
    soft_cap: float | int | None = None,
    teacher_soft_cap: float | int | None = None,
    vocab_where: Bool[Array, " vocab"] | None = None,
    token_weights: Float[Array, "*batch"] | None = None,
    block_size: int | None = None,
    token_block: int | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*losses"]:
    """`kl_divergence` of two linear heads' logits, neither of which exist as a whole.

    Both heads are visited block by block of one shared vocabulary, with the sums of both softmaxes
    and the expected log-ratio kept online: one sweep for the value, one for the gradient. The
    teacher gets no gradient, and nothing is kept for it. Forward and reverse cost the same.

    ::

        logits = cap tanh((hidden @ head + bias) / cap) / T
        T^2 KL(teacher || student), or T^2 KL(student || teacher)

    Args:
      hidden: `[*batch, hidden]`, the student's, float32 or bfloat16.
      head: `[hidden, vocab]` or `[vocab, hidden]`.
      teacher_hidden: `[*batch, teacher_hidden]`.
      teacher_head: as `head`, with the same vocabulary.
      direction: 'forward' for KL(teacher || student), 'reverse' for KL(student || teacher).
      bias: `[vocab]`.
      teacher_bias: `[vocab]`.
      vocab_axis: the head's vocabulary axis; needed only for a square head.
      teacher_vocab_axis: likewise.
      temperature: `T`, positive; may be traced, but gets no gradient.
      soft_cap: `cap` of the student's logits.
      teacher_soft_cap: `cap` of the teacher's.
      vocab_where: `[vocab]` boolean: True for the entries that exist in both.
      token_weights: `[*batch]`. Gives the scalar `sum(token_weights * loss)` and forms gradients in
        the same sweep as the value: four matmuls in place of six. A position of weight 0 counts for
        nothing.
      block_size: vocabulary entries a block; chosen from shape and backend by default.
      token_block: positions a block along the last batch axis; likewise.
      axis_name: inside `jax.shard_map` with both heads' vocabulary split over this mesh axis: that
        axis.

    Returns:
      `[*batch]` float32, or a scalar with `token_weights`; `inf` as in `kl_divergence`.

    Raises:
      TypeError: arrays are not floating point.
      ValueError: shapes do not fit, a head is square and its axis is not given, or `direction` is
        unknown.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1,))
    >>> head, teacher_head = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    >>> print(f"{linear_kl_divergence(one, head, one, teacher_head):.4f}")
    0.1308
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    loss = sweep(
        functools.partial(_kl, direction == "reverse"),
        Branch(hidden, head, bias, vocab_axis, soft_cap),
        Branch(
            teacher_hidden,
            teacher_head,
            teacher_bias,
            teacher_vocab_axis,
            teacher_soft_cap,
            "teacher_",
        ),
        temperature=temperature,
        vocab_where=vocab_where,
        combine=_identity,
        token_weights=token_weights,
        block_size=block_size,
        token_block=token_block,
        axis_name=axis_name,
    )
    loss = loss if token_weights is None else loss[0]
    return loss * jnp.square(jnp.asarray(temperature, loss.dtype))


def linear_generalized_jensen_shannon(
    hidden: Float[Array, "*batch hidden"],
    head: Float[Array, "rows columns"],
    teacher_hidden: Float[Array, "*batch teacher_hidden"],
    teacher_head: Float[Array, "teacher_rows teacher_columns"],
    *,
    beta: float | int = 0.5,
    bias: Float[Array, " vocab"] | None = None,
    teacher_bias: Float[Array, " vocab"] | None = None,
    vocab_axis: int | None = None,
    teacher_vocab_axis: int | None = None,
    temperature: Number = 1.0,
    soft_cap: float | int | None = None,
    teacher_soft_cap: float | int | None = None,
    vocab_where: Bool[Array, " vocab"] | None = None,
    token_weights: Float[Array, "*batch"] | None = None,
    block_size: int | None = None,
    token_block: int | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*losses"]:
    """`generalized_jensen_shannon` of two linear heads, without the logits of either.

    The mixture needs both normalisers before its first term, so the value takes two sweeps over
    the vocabulary and the gradient a third; with `token_weights` there is one.

    ::

        m = beta p + (1 - beta) q
        beta KL(p || m) + (1 - beta) KL(q || m),    KL(p || q) at beta = 0, KL(q || p) at beta = 1

    Args:
      hidden: `[*batch, hidden]`, the student's.
      head: `[hidden, vocab]` or `[vocab, hidden]`.
      teacher_hidden: `[*batch, teacher_hidden]`; gets no gradient.
      teacher_head: as `head`, with the same vocabulary; gets no gradient.
      beta: the teacher's weight, in `[0, 1]`.
      bias: as in `linear_kl_divergence`, like all that follow.
      teacher_bias: `[vocab]`.
      vocab_axis: 0 or 1.
      teacher_vocab_axis: 0 or 1.
      temperature: `T`. The result is not multiplied by `T^2`.
      soft_cap: of the student's logits.
      teacher_soft_cap: of the teacher's.
      vocab_where: `[vocab]` boolean.
      token_weights: `[*batch]`; gives a scalar.
      block_size: vocabulary entries a block.
      token_block: positions a block.
      axis_name: mesh axis that splits the vocabulary.

    Returns:
      `[*batch]` float32, or a scalar with `token_weights`.

    Raises:
      TypeError: arrays are not floating point.
      ValueError: shapes do not fit, or `beta` is out of range.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1,))
    >>> head, teacher_head = jnp.array([[9.0, -90.0]]), jnp.array([[-90.0, 9.0]])
    >>> print(f"{linear_generalized_jensen_shannon(one, head, one, teacher_head):.4f}")
    0.6931
    """
    check_between(beta, 0, 1, "beta")
    if beta in (0, 1):
        statistic = functools.partial(_kl, beta == 1)
    else:
        statistic = functools.partial(_jensen_shannon, float(beta))
    loss = sweep(
        statistic,
        Branch(hidden, head, bias, vocab_axis, soft_cap),
        Branch(
            teacher_hidden,
            teacher_head,
            teacher_bias,
            teacher_vocab_axis,
            teacher_soft_cap,
            "teacher_",
        ),
        temperature=temperature,
        vocab_where=vocab_where,
        combine=_identity,
        token_weights=token_weights,
        block_size=block_size,
        token_block=token_block,
        axis_name=axis_name,
    )
    return loss if token_weights is None else loss[0]


def linear_total_variation(
    hidden: Float[Array, "*batch hidden"],
    head: Float[Array, "rows columns"],
    teacher_hidden: Float[Array, "*batch teacher_hidden"],
    teacher_head: Float[Array, "teacher_rows teacher_columns"],
    *,
    bias: Float[Array, " vocab"] | None = None,
    teacher_bias: Float[Array, " vocab"] | None = None,
    vocab_axis: int | None = None,
    teacher_vocab_axis: int | None = None,
    temperature: Number = 1.0,
    soft_cap: float | int | None = None,
    teacher_soft_cap: float | int | None = None,
    vocab_where: Bool[Array, " vocab"] | None = None,
    token_weights: Float[Array, "*batch"] | None = None,
    block_size: int | None = None,
    token_block: int | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*losses"]:
    """`total_variation` of two linear heads, without the logits of either.

    Takes as many sweeps as `linear_generalized_jensen_shannon`.

    ::

        1/2 sum_v |p_v - q_v|

    Args:
      hidden: `[*batch, hidden]`, the student's.
      head: `[hidden, vocab]` or `[vocab, hidden]`.
      teacher_hidden: `[*batch, teacher_hidden]`; gets no gradient.
      teacher_head: as `head`, with the same vocabulary; gets no gradient.
      bias: as in `linear_kl_divergence`, like all that follow.
      teacher_bias: `[vocab]`.
      vocab_axis: 0 or 1.
      teacher_vocab_axis: 0 or 1.
      temperature: `T`.
      soft_cap: of the student's logits.
      teacher_soft_cap: of the teacher's.
      vocab_where: `[vocab]` boolean.
      token_weights: `[*batch]`; gives a scalar.
      block_size: vocabulary entries a block.
      token_block: positions a block.
      axis_name: mesh axis that splits the vocabulary.

    Returns:
      `[*batch]` float32 in `[0, 1]`, or a scalar with `token_weights`.

    Raises:
      TypeError: arrays are not floating point.
      ValueError: shapes do not fit.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1,))
    >>> head, teacher_head = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    >>> print(f"{linear_total_variation(one, head, one, teacher_head):.2f}")
    0.25
    """
    loss = sweep(
        _total_variation,
        Branch(hidden, head, bias, vocab_axis, soft_cap),
        Branch(
            teacher_hidden,
            teacher_head,
            teacher_bias,
            teacher_vocab_axis,
            teacher_soft_cap,
            "teacher_",
        ),
        temperature=temperature,
        vocab_where=vocab_where,
        combine=_identity,
        token_weights=token_weights,
        block_size=block_size,
        token_block=token_block,
        axis_name=axis_name,
    )
    return loss if token_weights is None else loss[0]


def _identity(outputs: jax.Array, tokens: Any) -> jax.Array:
    return outputs


def _kl(reverse: bool, dtype: Any) -> KLStatistic:
    return KLStatistic(reverse=reverse, dtype=dtype)


def _jensen_shannon(beta: float, dtype: Any) -> JensenShannonStatistic:
    return JensenShannonStatistic(beta=beta, dtype=dtype)


def _total_variation(dtype: Any) -> TotalVariationStatistic:
    return TotalVariationStatistic(dtype=dtype)
