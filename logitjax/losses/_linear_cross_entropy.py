import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.losses.sweep import Head, ReadoutStatistic
from logitjax.losses.sweep._run import Options, weighted_or_each
from logitjax.ops import Array, checks, neginf_to_zero


def linear_cross_entropy(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    labels: Int[Array, "*batch"],
    *,
    label_smoothing: float | int = 0.0,
    z_loss: float | int = 0.0,
    **options: Unpack[Options],
) -> Float[jax.Array, "*losses"]:
    """`cross_entropy` of a linear head's logits, which are never held as a whole.

    The vocabulary is visited in blocks, once for the value and once more for the gradient, which
    forms the logits of a block again and writes the head's gradient in place. Only a few numbers
    per position are saved in between. With `e = label_smoothing` and `c = z_loss` the loss is::

        (1 - e) (log Z - logits_y) + e mean_v (log Z - logits_v) + c (log Z)^2

    See `logitjax.losses` for what all losses take, return and raise.

    Returns:
        `[*batch]` float32, or a scalar with `weights`. As in `cross_entropy`, `inf` if the label's
        entry is not valid, nan if the label is outside the vocabulary.

    >>> import jax, numpy as np
    >>> hidden, head = np.eye(2), np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    >>> [f"{loss:.3f}" for loss in jax.jit(linear_cross_entropy)(hidden, head, np.array([0, 2]))]
    ['0.693', '2.303']

    References:
        Wijmans et al., Cut your losses in large-vocabulary language models, 2024 (arXiv
        2411.09009), for the idea; no gradient is filtered here. Hsu et al., Liger kernel, 2024
        (arXiv 2410.10989), for gradients in the forward pass.
    """
    checks.shapes(hidden=(hidden, "float *batch hidden"), labels=(labels, "int *batch"))
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    head = Head.of(head).resolve(jnp.shape(hidden)[-1])
    statistic = _CrossEntropy(
        labels=True,
        # Computed only if used.
        mean=bool(label_smoothing),
        vocab=head.vocab_size(options.get("axis_name")),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return weighted_or_each(statistic, hidden, head, tokens={"labels": labels}, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CrossEntropy(ReadoutStatistic):
    vocab: int
    label_smoothing: float
    z_loss: float

    def losses(self, outputs: Any, tokens: Any) -> jax.Array:
        log_z = neginf_to_zero(outputs.log_z)
        loss = log_z - outputs.label
        if self.label_smoothing:
            uniform = log_z - outputs.mean  # against 1 / V
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * uniform
        if self.z_loss:
            # As in PaLM: keeps log Z near 0.
            loss = loss + self.z_loss * jnp.square(log_z)
        labels = tokens["labels"]
        return jnp.where((labels >= 0) & (labels < self.vocab), loss, jnp.nan)
