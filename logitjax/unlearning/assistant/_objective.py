"""An assistant's objective: know the rows to forget, and be uniform on the rest."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax.losses import Blocks, Head
from logitjax.losses.sweep import ReadoutStatistic, run
from logitjax.ops import Array, AxisName, checks, masked_mean, neginf_to_zero
from logitjax.ops import mesh as on_mesh


def linear_assistant_objective(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    labels: Int[Array, "*batch"],
    retain: Bool[Array, "*batch"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    retain_weight: float | int = 6.5,
    surplus_weight: float | int = 0.0,
    vocab_where: Bool[Array, " vocab"] | None = None,
    blocks: Blocks | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """Compute the objective of a logit difference's assistant, both halves in one sweep.

    It is the loss of `methods.Difference`, gamma being `surplus_weight`. KL(uniform || p) hardly
    reacts to what the surplus measures: with p(y) of 0.2 and 50,000 tokens it is 0.2 nats, and
    `log V + log p(y)` is 9.

    References:
        Ji et al., Reversing the forget-retain objectives, 2024 (arXiv 2406.08607), eqs. 3-5, less
        the constant `beta log V`. The release takes the log of a float32 softmax, which is infinite
        once a logit lies 103 below the largest.
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
    weights = jnp.where(retain, shares["retain"], shares["forget"]) * counts
    floor = jnp.log(_entries(head, vocab_where, axis_name))
    statistic = _Assistant(
        labels=True,
        mean=True,
        vocab=head.vocab_size(axis_name),
        silence=retain_weight,
        surplus=surplus_weight,
    )
    total, outputs = run(
        statistic,
        hidden,
        head,
        tokens={"labels": labels, "retain": retain, "floor": jnp.broadcast_to(floor, retain.shape)},
        vocab_where=vocab_where,
        weights=weights,
        blocks=blocks,
        axis_name=axis_name,
    )
    # The term log V of eqs. 3-5, which the sweep does not know.
    loss = total - retain_weight * floor * jnp.where(sides["retain"], weights, 0.0).sum()
    # KL(uniform || p)
    silent = neginf_to_zero(outputs.log_z) - outputs.mean - floor
    means = {
        "forget": masked_mean(statistic.cross_entropy(outputs, labels), sides["forget"]),
        "retain": masked_mean(silent, sides["retain"]),
    }
    return loss, means


def _entries(head: Head, vocab_where: Array | None, axis_name: AxisName | None) -> jax.Array:
    """Number of existing vocabulary entries, on all shards together."""
    wide = jnp.promote_types(head.kernel.dtype, jnp.float32)
    size = (head.vocab_size(),)
    exists = jnp.ones(size, bool) if vocab_where is None else jnp.asarray(vocab_where)
    if head.bias is not None:
        exists = exists & (jnp.asarray(head.bias) != -jnp.inf)
    return jnp.maximum(on_mesh.psum(exists.sum(), axis_name), 1).astype(wide)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Assistant(ReadoutStatistic):
    """Losses: ignorance of answers to forget, and non-uniformity on rows to keep."""

    vocab: int
    silence: float
    surplus: float

    def losses(self, outputs: Any, tokens: Any) -> jax.Array:
        log_z = neginf_to_zero(outputs.log_z)
        silent = self.silence * (log_z - outputs.mean)
        if self.surplus:
            more = jnp.maximum(tokens["floor"] + outputs.label - log_z, 0.0)
            # Labels outside the vocabulary have nothing to lose.
            inside = (tokens["labels"] >= 0) & (tokens["labels"] < self.vocab)
            silent += self.surplus * jnp.where(inside, more, 0.0)
        return jnp.where(tokens["retain"], silent, self.cross_entropy(outputs, tokens["labels"]))

    def cross_entropy(self, outputs: Any, labels: Any) -> jax.Array:
        """Cross-entropy of the labels; nan where one is outside the vocabulary."""
        inside = (labels >= 0) & (labels < self.vocab)
        return jnp.where(inside, neginf_to_zero(outputs.log_z) - outputs.label, jnp.nan)


def next_tokens(tokens: Any, answers: Any) -> tuple[jax.Array, jax.Array]:
    """Return the target of each position, and a mask of targets in the answer."""
    # The last position predicts nothing.
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return labels, jnp.pad(jnp.asarray(answers)[:, 1:], ((0, 0), (0, 1)))
