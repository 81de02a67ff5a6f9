"""Graph fusion from hidden states: SFT, ULD and GLD out of one sweep over the vocabulary."""

from collections.abc import Sequence

import jax
from jaxtyping import Bool, Float, Int

from logitjax.distillation._graph_fusion import (
    FusionTeacher,
    GraphFusionConfig,
    graph_fusion_objective,
)
from logitjax.losses._linear_readout import linear_readout
from logitjax.ops import Array, AxisName


def linear_graph_fusion(
    hidden: Float[Array, "*batch positions hidden"],
    head: Float[Array, "rows columns"],
    labels: Int[Array, "*batch positions"],
    teachers: Sequence[FusionTeacher],
    *,
    where: Bool[Array, "*batch positions"] | None = None,
    config: GraphFusionConfig = GraphFusionConfig(),  # noqa: B008
    bias: Float[Array, " vocab"] | None = None,
    vocab_axis: int | None = None,
    soft_cap: float | int | None = None,
    vocab_where: Bool[Array, " vocab"] | None = None,
    block_size: int | None = None,
    token_block: int | None = None,
    axis_name: AxisName | None = None,
    sequence_axis_name: str | None = None,
) -> tuple[Float[jax.Array, "*batch"], dict[str, jax.Array]]:
    """`graph_fusion_objective` of a linear head's logits, which never exist as a whole.

    One sweep gives the labels' cross-entropy and the top logits with their log-normaliser, mean and
    deviation; SFT, ULD and GLD are functions of these, and one more sweep takes their gradients
    back to the hidden states and the head.

    Args:
      hidden: `[*batch, positions, hidden]`; position t predicts `labels[t]`.
      head: `[hidden, vocab]` or `[vocab, hidden]`.
      labels: `[*batch, positions]`.
      teachers: `FusionTeacher`, each best given as `GraphStatistics` (from a cache, or from
        `linear_readout` of its own hidden states).
      where: `[*batch, positions]` boolean, the positions that count.
      config: weights and graph options.
      bias: `[vocab]`.
      vocab_axis: the head's vocabulary axis; needed only for a square head.
      soft_cap: of the student's logits.
      vocab_where: `[vocab]` boolean: True for the entries that exist.
      block_size: vocabulary entries a block; chosen from shape and backend by default.
      token_block: positions a block; likewise.
      axis_name: mesh axis that splits the head's vocabulary, inside `jax.shard_map`.
      sequence_axis_name: mesh axis that splits positions, inside `jax.shard_map`.

    Returns:
      The objective `[*batch]`, float32, and metrics, as `graph_fusion_objective`.

    Raises:
      ValueError: shapes do not fit.

    >>> import jax, jax.numpy as jnp
    >>> from logitjax.losses import graph_statistics
    >>> hidden, head = jnp.ones((2, 8, 4)), jax.random.normal(jax.random.key(0), (4, 32))
    >>> teacher = graph_statistics(jax.random.normal(jax.random.key(1), (2, 6, 48)), 10)
    >>> labels = jnp.zeros((2, 8), jnp.int32)
    >>> loss, metrics = linear_graph_fusion(hidden, head, labels, [FusionTeacher(outputs=teacher)])
    >>> loss.shape, sorted(metrics)[:4]
    ((2,), ['gld', 'gld/0', 'graph/...', ...])

    References:
      InfiGFusion (arXiv 2505.13893).
    """
    readout = linear_readout(
        hidden,
        head,
        labels=labels,
        top_k=config.k if teachers else None,
        bias=bias,
        vocab_axis=vocab_axis,
        soft_cap=soft_cap,
        vocab_where=vocab_where,
        block_size=block_size,
        token_block=token_block,
        axis_name=axis_name,
    )
    if readout.statistics is None:
        raise ValueError("teachers: expected at least one; without any use linear_cross_entropy")
    return graph_fusion_objective(
        readout.statistics,
        None,
        teachers,
        where=where,
        config=config,
        cross_entropy=readout.cross_entropy,
        sequence_axis_name=sequence_axis_name,
    )
