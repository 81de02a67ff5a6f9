"""Graph fusion from hidden states: SFT, ULD and GLD out of one sweep over the vocabulary."""

from collections.abc import Sequence

import jax
from jaxtyping import Bool, Float, Int

from logitjax.distillation._graph_fusion import (
    FusionTeacher,
    GraphFusionConfig,
    graph_fusion_objective,
)
from logitjax.losses import Blocks, Head, linear_readout
from logitjax.ops import Array, AxisName


def linear_graph_fusion(
    hidden: Float[Array, "*batch positions hidden"],
    head: Head | Float[Array, "rows columns"],
    labels: Int[Array, "*batch positions"],
    teachers: Sequence[FusionTeacher],
    *,
    where: Bool[Array, "*batch positions"] | None = None,
    config: GraphFusionConfig = GraphFusionConfig(),  # noqa: B008
    vocab_where: Bool[Array, " vocab"] | None = None,
    blocks: Blocks | None = None,
    axis_name: AxisName | None = None,
    sequence_axis_name: str | None = None,
) -> tuple[Float[jax.Array, "*batch"], dict[str, jax.Array]]:
    """`graph_fusion_objective` of a linear head's logits, which never exist as a whole.

    One sweep gives the labels' cross-entropy and the top logits with their log-normaliser, mean and
    deviation; SFT, ULD and GLD are functions of these, and one more sweep takes their gradients
    back to the hidden states and the head.

    Args:
        hidden: `[*batch, positions, hidden]`; position t predicts `labels[t]`.
        head: a `logitjax.losses.Head`, or a kernel alone.
        labels: `[*batch, positions]`.
        teachers: `FusionTeacher`, each best given as `GraphStatistics` (from a cache, or from
            `linear_readout` of its own hidden states).
        where: `[*batch, positions]` boolean, the positions that count.
        config: weights and graph options.
        vocab_where: `[vocab]` boolean: True for the entries that exist.
        blocks: what may be held at a time; chosen from shapes and device when None.
        axis_name: mesh axis that splits the head's vocabulary, inside `jax.shard_map`.
        sequence_axis_name: mesh axis that splits positions, inside `jax.shard_map`.

    Returns:
        The objective `[*batch]`, float32, and metrics, as `graph_fusion_objective`.

    Raises:
        ValueError: shapes do not fit.

    >>> import jax, numpy as np
    >>> from logitjax.losses import graph_statistics
    >>> rng = np.random.default_rng(0)
    >>> hidden, head, logits = (rng.normal(size=s) for s in ((2, 8, 4), (4, 32), (2, 6, 48)))
    >>> @jax.jit
    ... def fusion(hidden, head, labels, logits):
    ...     teacher = FusionTeacher(outputs=graph_statistics(logits, 10))
    ...     return linear_graph_fusion(hidden, head, labels, [teacher])
    >>> loss, metrics = fusion(hidden, head, np.zeros((2, 8), int), logits)
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
        vocab_where=vocab_where,
        blocks=blocks,
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
