import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax.losses._graph_statistics import GraphStatistics
from logitjax.losses.sweep import Blocks, Head, LossOf, ReadoutStatistic, run
from logitjax.ops import Array, AxisName, Number, checks, neginf_to_zero


class Readout(NamedTuple):
    """Results of `linear_readout`, in float32; None for those not requested.

    Attributes:
        log_z: `[*batch]` log-sum-exp of the logits.
        label_logit: `[*batch]` the logit at `labels`.
        gathered: `[*batch, n]` the logits at `ids`; nan for ids outside the vocabulary. Read at the
            ids of a teacher's `TopK`, it can be the student of `sparse_kl_divergence`.
        ids: `[*batch, n]` the ids of `gathered`.
        statistics: `GraphStatistics` of the top k.
        cross_entropy: `[*batch]` of the labels; nan for labels outside the vocabulary.
    """

    log_z: jax.Array
    label_logit: Any = None
    gathered: Any = None
    statistics: Any = None
    cross_entropy: Any = None
    ids: Any = None


def linear_readout(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    *,
    labels: Int[Array, "*batch"] | None = None,
    ids: Int[Array, "*batch n"] | None = None,
    top_k: int | None = None,
    temperature: Number = 1.0,
    vocab_where: Bool[Array, " vocab"] | None = None,
    blocks: Blocks | None = None,
    axis_name: AxisName | None = None,
) -> Readout:
    """Read from the logits what losses need, in one sweep over the vocabulary.

    A loss that is a function of a few numbers per position (the log-normaliser, the logits of the
    label or of a teacher's top tokens, the top k with mean and deviation) can be computed from the
    result as if the logits were available: every float of the result is differentiable, and the
    backward pass is one more sweep however many of them are used. See `logitjax.losses` for what
    all losses take, return and raise.

    Args:
        labels: `[*batch]`; requests `label_logit` and `cross_entropy`.
        ids: `[*batch, n]` vocabulary ids; requests `gathered`.
        top_k: requests `statistics` with so many entries, exact, ties lowest id first.

    Raises:
        ValueError: shapes do not fit, or `top_k` is not within the vocabulary.

    >>> import jax, numpy as np
    >>> hidden, head = np.ones((2, 1)), np.array([[1.0, 3.0, 2.0]])
    >>> read = jax.jit(linear_readout, static_argnames="top_k")
    >>> readout = read(hidden, head, labels=np.array([0, 2]), top_k=2)
    >>> readout.label_logit.tolist(), readout.statistics.indices.tolist()
    ([1.0, 2.0], [[1, 2], [1, 2]])
    """
    checks.shapes(hidden=(hidden, "float *batch hidden"))
    head = Head.of(head).resolve(jnp.shape(hidden)[-1])
    statistic, tokens = readout_statistic(
        head, labels=labels, ids=ids, top_k=top_k, axis_name=axis_name
    )
    return run(
        statistic,
        hidden,
        head,
        tokens=tokens,
        temperature=temperature,
        vocab_where=vocab_where,
        blocks=blocks,
        axis_name=axis_name,
    )


def linear_fused_loss(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    loss: Callable[[Readout, Any], jax.Array],
    tokens: Any,
    weights: Float[Array, "*batch"],
    *,
    labels: Int[Array, "*batch"] | None = None,
    ids: Int[Array, "*batch n"] | None = None,
    top_k: int | None = None,
    blocks: Blocks | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Float[jax.Array, ""], Readout]:
    """Sum any loss of a `Readout` over positions, with gradients formed in the same sweep.

    This equals `linear_readout` followed by the loss, but is a quarter cheaper: because the weights
    of positions are known, no logit is formed twice. The loss must treat positions separately,
    because it is called on a few of them at a time. Give invalid entries a bias of `-inf`; for a
    temperature divide hidden states, bias and cap. The value is `sum(weights * loss(readout,
    tokens))`; `labels`, `ids` and `top_k` are those of `linear_readout`.

    Args:
        loss: `(readout, tokens) -> [*batch]`. It must not close over traced arrays: pass them
            through `tokens`.
        tokens: pytree of `[*batch, ...]` arrays, such as a teacher's `TopK`. Gets no gradient.

    Returns:
        The scalar, and the `Readout` without a gradient, for metrics.

    >>> import jax, numpy as np
    >>> from logitjax import losses, ops
    >>> def half_and_half(readout, teacher):
    ...     kl = losses.sparse_kl_divergence(readout, teacher)
    ...     return 0.5 * readout.cross_entropy + 0.5 * kl
    >>> hidden, head = np.ones((4, 1)), np.array([[1.0, 3.0, 2.0]])
    >>> teacher = jax.jit(ops.TopK.of, static_argnums=1)(np.tile(head, (4, 1)), 2)
    >>> loss = jax.jit(linear_fused_loss, static_argnums=2)
    >>> value, readout = loss(hidden, head, half_and_half, teacher, np.full(4, 0.25),
    ...                       labels=np.array([1, 1, 1, 1]), ids=teacher.indices)
    >>> print(f"{value:.4f} {np.mean(readout.cross_entropy):.4f}")
    0.2038 0.4076
    """
    checks.shapes(hidden=(hidden, "float *batch hidden"), weights=(weights, "float *batch"))
    head = Head.of(head).resolve(jnp.shape(hidden)[-1])
    statistic, columns = readout_statistic(
        head, labels=labels, ids=ids, top_k=top_k, axis_name=axis_name
    )
    value, outputs = run(
        LossOf(statistic, loss),
        hidden,
        head,
        tokens={"statistic": columns, "loss": tokens},
        weights=weights,
        blocks=blocks,
        axis_name=axis_name,
    )
    # The readout that the losses were computed from.
    return value, statistic.losses(outputs, columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reading(ReadoutStatistic):
    vocab: int

    def losses(self, outputs: Any, tokens: Any) -> Any:
        statistics = entropy = None
        if self.k:
            statistics = GraphStatistics(
                values=outputs.values,
                indices=outputs.indices,
                log_z=outputs.log_z,
                mean=outputs.mean,
                std=outputs.std,
                vocab_size=self.vocab,
            )
        if self.labels:
            existing = (tokens["labels"] >= 0) & (tokens["labels"] < self.vocab)
            entropy = jnp.where(existing, neginf_to_zero(outputs.log_z) - outputs.label, jnp.nan)
        gathered, ids = outputs.gathered, tokens.get("ids")
        if gathered is not None:
            # The sweep never visits an id outside the vocabulary.
            existing = (ids >= 0) & (ids < self.vocab)
            gathered = jnp.where(existing, gathered, jnp.nan)
        return Readout(outputs.log_z, outputs.label, gathered, statistics, entropy, ids)


def readout_statistic(
    head: Head,
    *,
    labels: Array | None = None,
    ids: Array | None = None,
    top_k: int | None = None,
    axis_name: AxisName | None = None,
) -> tuple[ReadoutStatistic, dict[str, jax.Array]]:
    """Build the statistic that gives a `Readout`, and the tokens it reads, for `sweep.run`.

    It takes the arguments of `linear_readout`, which runs it; with `sweep.Several` it shares a
    sweep with others. `head` is a `Head` with known vocabulary axis.
    """
    vocab = head.vocab_size(axis_name)
    if top_k is not None and not 1 <= top_k <= vocab:
        raise ValueError(f"top_k: expected 1 to the vocabulary size {vocab}, got {top_k}")
    arrays = {"labels": labels, "ids": ids}
    tokens = {name: jnp.asarray(value) for name, value in arrays.items() if value is not None}
    for name, value in tokens.items():
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{name}: expected integers, got {value.dtype}")
    statistic = _Reading(
        labels="labels" in tokens,
        # A statistic holds no arrays.
        ids=tokens["ids"].shape[-1] if "ids" in tokens else 0,
        k=top_k or 0,
        moments=bool(top_k),
        vocab=vocab,
    )
    return statistic, tokens
