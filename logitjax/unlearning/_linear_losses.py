"""Unlearning losses from hidden states, without the logits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax.losses import Blocks, Head
from logitjax.losses.sweep import KLStatistic, LogitBlock, ReadoutStatistic, run
from logitjax.ops import Array, AxisName, checks, masked_mean, neginf_to_zero, psum


def linear_uniform_kl(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    *,
    vocab_where: Bool[Array, " vocab"] | None = None,
    blocks: Blocks | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*batch"]:
    """`uniform_kl` of a linear head's logits, which never exist as a whole.

    The gradient by a logit, `p_v - 1/V`, is formed before it is rounded to the head's type: near
    the optimum its two parts are almost the same.

    ::

        log Z - mean_v logits_v - log V

    Args:
        hidden: `[*batch, hidden]`, float32 or bfloat16.
        head: a `logitjax.losses.Head`, or a kernel alone; entries whose bias is `-inf` do not
            exist.
        vocab_where: `[vocab]` boolean: True for the entries that exist.
        blocks: what may be held at a time; chosen from shapes and device when None.
        axis_name: inside `jax.shard_map` with the head's vocabulary split over this mesh axis: that
            axis.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: arrays are not floating point.
        ValueError: shapes do not fit, or a kernel is square and its axis is not given.

    >>> hidden, head = jnp.ones((2, 1)), jnp.array([[400.0, 0.0, 0.0]])
    >>> [f"{kl:.3f}" for kl in jax.jit(linear_uniform_kl)(hidden, head).tolist()]
    ['265.568', '265.568']

    References:
        As `uniform_kl`.
    """
    checks.shapes(hidden=(hidden, "float *batch hidden"))
    hidden = jnp.asarray(hidden)
    head = Head.of(head).resolve(hidden.shape[-1])
    outputs = run(
        ReadoutStatistic(mean=True),
        hidden,
        head,
        vocab_where=vocab_where,
        blocks=blocks,
        axis_name=axis_name,
    )
    count = _entries(head, vocab_where, axis_name)
    return neginf_to_zero(outputs.log_z) - outputs.mean - jnp.log(count)


def linear_pdu(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    *,
    vocab_where: Bool[Array, " vocab"] | None = None,
    blocks: Blocks | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*batch"]:
    """`pdu` of a linear head's logits, which never exist as a whole.

    Args:
        hidden: `[*batch, hidden]`, float32 or bfloat16.
        head: a `logitjax.losses.Head`, or a kernel alone; entries whose bias is `-inf` do not
            exist.
        vocab_where: `[vocab]` boolean: True for the entries that exist.
        blocks: what may be held at a time; chosen from shapes and device when None.
        axis_name: mesh axis that splits the vocabulary.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: arrays are not floating point.
        ValueError: shapes do not fit, or a kernel is square and its axis is not given.

    >>> hidden, head = jnp.ones((1, 1)), jnp.array([[3.0, 1.0, -1.0]])
    >>> jax.jit(linear_pdu)(hidden, head).tolist()
    [4.0]

    References:
        As `pdu`.
    """
    checks.shapes(hidden=(hidden, "float *batch hidden"))
    hidden = jnp.asarray(hidden)
    outputs = run(
        ReadoutStatistic(k=1, mean=True),
        hidden,
        Head.of(head).resolve(hidden.shape[-1]),
        vocab_where=vocab_where,
        blocks=blocks,
        axis_name=axis_name,
    )
    return jnp.square(neginf_to_zero(outputs.values[..., 0]) - outputs.mean)


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

    Args:
        hidden: `[*batch, hidden]`.
        head: a `logitjax.losses.Head`, or a kernel alone.
        reference_hidden: `[*batch, reference_hidden]`, of the model before unlearning.
        reference_head: as `head`. The reference gets no gradient.
        labels: `[*batch]`, the tokens to forget.
        beta: how far their logit is lowered.
        vocab_where: `[vocab]` boolean: True for the entries that exist.
        weights: `[*batch]`; gives the scalar `sum(weights * loss)`, with gradients in the same
            sweep as the value.
        blocks: sizes of the blocks.
        axis_name: mesh axis that splits the vocabulary.

    Returns:
        float32 `[*batch]`, or a scalar with `weights`; nan where the label is outside the
        vocabulary.

    Raises:
        TypeError: arrays are not floating point or labels not integers.
        ValueError: shapes do not fit.

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


def linear_assistant_objective(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    labels: Int[Array, "*batch"],
    retain: Bool[Array, "*batch"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    retain_weight: float | int = 6.5,
    vocab_where: Bool[Array, " vocab"] | None = None,
    blocks: Blocks | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """What the assistant of a logit difference learns, both halves in one sweep over the head.

    To know what is to be forgotten, only that: the objectives of unlearning reversed, so neither is
    unbounded. The rows to forget and to keep lie in one batch, which the assistant runs once; the
    gradient is formed in the same sweep as the value.

    ::

        mean_{forget} (log Z - logit_y) + beta mean_{retain} (log Z - mean_v logit_v - log V)

    Args:
        hidden: `[*batch, hidden]`, of the assistant.
        head: a `logitjax.losses.Head`, or a kernel alone.
        labels: `[*batch]`; those of retain positions are not looked at.
        retain: `[*batch]`, True for positions of the data to keep.
        where: `[*batch]`, positions that count; all when None. The release counts all of the data
            to keep, and the answers of the data to forget.
        retain_weight: beta: 6.5 in the paper, 5 in the released code.
        vocab_where: `[vocab]` boolean: True for the entries that exist.
        blocks: sizes of the blocks.
        axis_name: mesh axis that splits the vocabulary.

    Returns:
        The float32 scalar, and both means: `{"forget", "retain"}`, without a gradient.

    Raises:
        TypeError: arrays are not floating point.
        ValueError: shapes do not fit.

    >>> hidden, head = jnp.ones((4, 1)), jnp.array([[2.0, 0.0, 0.0]])
    >>> retain = jnp.array([False, False, True, True])
    >>> labels = jnp.array([0, 0, -100, -100])
    >>> loss, means = jax.jit(linear_assistant_objective)(hidden, head, labels, retain)
    >>> print(f"{loss:.4f} {means['forget']:.4f} {means['retain']:.4f}")
    3.3223 0.2395 0.4743

    References:
        Ji et al., Reversing the forget-retain objectives, 2024 (arXiv 2406.08607), eqs. 3-5, less
        the constant `beta log V`.
    """
    checks.shapes(
        hidden=(hidden, "float *batch hidden"),
        labels=(labels, "int *batch"),
        retain=(retain, "bool *batch"),
        where=(where, "bool *batch"),
    )
    hidden, labels, retain = jnp.asarray(hidden), jnp.asarray(labels), jnp.asarray(retain)
    head = Head.of(head).resolve(hidden.shape[-1])
    counts = jnp.ones(retain.shape, bool) if where is None else jnp.asarray(where)
    sides = {"forget": counts & ~retain, "retain": counts & retain}
    shares = {name: 1.0 / jnp.maximum(side.sum(), 1) for name, side in sides.items()}
    weights = jnp.where(sides["forget"], shares["forget"], 0.0)
    weights += jnp.where(sides["retain"], retain_weight * shares["retain"], 0.0)
    statistic = _Assistant(labels=True, mean=True, vocab=head.vocab_size(axis_name))
    total, outputs = run(
        statistic,
        hidden,
        head,
        tokens={"labels": labels, "retain": retain},
        vocab_where=vocab_where,
        weights=weights,
        blocks=blocks,
        axis_name=axis_name,
    )
    floor = jnp.log(_entries(head, vocab_where, axis_name))
    loss = total - floor * jnp.where(sides["retain"], weights, 0.0).sum()
    silent = neginf_to_zero(outputs.log_z) - outputs.mean - floor
    means = {
        "forget": masked_mean(statistic.known(outputs, labels), sides["forget"]),
        "retain": masked_mean(silent, sides["retain"]),
    }
    return loss, means


def _entries(head: Head, vocab_where: Array | None, axis_name: AxisName | None) -> jax.Array:
    """How many entries of the vocabulary exist, on all shards together."""
    wide = jnp.promote_types(head.kernel.dtype, jnp.float32)
    size = (head.vocab_size(),)
    exists = jnp.ones(size, bool) if vocab_where is None else jnp.asarray(vocab_where)
    if head.bias is not None:
        exists = exists & (jnp.asarray(head.bias) != -jnp.inf)
    return jnp.maximum(psum(exists.sum(), axis_name), 1).astype(wide)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Assistant(ReadoutStatistic):
    """What does not know what to forget, and what is not silent about what to keep."""

    vocab: int

    def losses(self, outputs: Any, tokens: Any) -> jax.Array:
        silent = neginf_to_zero(outputs.log_z) - outputs.mean
        return jnp.where(tokens["retain"], silent, self.known(outputs, tokens["labels"]))

    def known(self, outputs: Any, labels: Any) -> jax.Array:
        """Cross-entropy of the labels; nan where one is outside the vocabulary."""
        inside = (labels >= 0) & (labels < self.vocab)
        return jnp.where(inside, neginf_to_zero(outputs.log_z) - outputs.label, jnp.nan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Undial(KLStatistic):
    """Cross-entropy from a teacher whose logit at the label is lowered by `strength`."""

    strength: float
    vocab: int

    def absorb(self, state: Any, block: LogitBlock, passed: Any) -> Any:
        over, under = self.sides(block)
        both = (over != -jnp.inf) & (under != -jnp.inf)
        logit = jnp.where(both, -under, 0.0)
        return state[0].add(over, logit, jnp.where(both, 0.0, 1.0)), state[1].add(under)

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        value, residuals = super().finish(state, passed)
        # The divergence's terms hold no teacher logits here, so its normaliser has to go as well.
        return value + residuals[3] * residuals[0], residuals

    def sides(self, block: LogitBlock) -> tuple[jax.Array, jax.Array]:
        assert block.teacher is not None
        hit = block.columns == block.tokens["labels"][..., None]
        return block.teacher - jnp.where(hit, self.strength, 0.0), block.student

    def losses(self, outputs: Any, tokens: Any) -> jax.Array:
        labels = tokens["labels"]
        return jnp.where((labels >= 0) & (labels < self.vocab), outputs, jnp.nan)
