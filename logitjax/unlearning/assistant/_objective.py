"""What an assistant learns: to know what is to be forgotten, and nothing about the rest."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax.losses import Blocks, Head
from logitjax.losses.sweep import ReadoutStatistic, run
from logitjax.ops import (
    Array,
    AxisName,
    checks,
    logsumexp,
    masked_mean,
    neginf_to_zero,
    psum,
)


def uniform_kl(
    logits: Float[Array, "*batch vocab"],
    *,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*batch"]:
    """Divergence of a model's distribution from the uniform one, which is 0 if it knows nothing.

    It trains the assistant of a logit difference to be silent about what is to be kept, so that
    subtracting its logits changes nothing there. Its gradient is `p - 1/V`.

    ::

        KL(U || p) = log Z - mean_v logits_v - log V

    Args:
        logits: `[*batch, vocab]`, any floating point dtype.
        vocab_where: boolean, broadcastable to the logits: True for the entries that exist, which
            the uniform distribution is over. Entries at `-inf` do not.
        axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis: that axis.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: the logits are not floating point or `vocab_where` not boolean.
        ValueError: `vocab_where` does not broadcast.

    >>> [f"{kl:.3f}" for kl in uniform_kl(jnp.array([[3.0, 3.0, -jnp.inf], [400.0, 0.0, 0.0]]))]
    ['0.000', '265.568']

    References:
        Ji et al., Reversing the forget-retain objectives, 2024 (arXiv 2406.08607), eq. 5, less the
        constant. The release takes the log of a float32 softmax, which is infinite once a logit
        lies 103 below the largest, and averages over all positions, prompt and padding included.
    """
    logits = checks.as_float(logits, "logits", vocab_where)
    log_z = neginf_to_zero(logsumexp(logits, axis_name=axis_name))
    exists = logits != -jnp.inf
    total = psum(jnp.where(exists, logits, 0.0).sum(-1), axis_name)
    count = jnp.maximum(psum(exists.sum(-1), axis_name), 1).astype(log_z.dtype)
    return log_z - total / count - jnp.log(count)


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

    Args, Returns and Raises as of `losses.linear_cross_entropy`, without labels.

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


def next_tokens(tokens: Any, answers: Any) -> tuple[jax.Array, jax.Array]:
    """What each position predicts, and where that is a token of the answer."""
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return labels, jnp.pad(jnp.asarray(answers)[:, 1:], ((0, 0), (0, 1)))
