import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from logitjax.ops import Array, AxisName, Number, checks, logsumexp, neginf_to_zero
from logitjax.ops import mesh as on_mesh


def cross_entropy(
    logits: Float[Array, "..."],
    labels: Int[Array, "..."],
    *,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "..."]:
    """Negative log-probability of the label at each position.

    The label's logit is found by comparing an iota with the label, not by a gather, so batch and
    vocabulary may be split over any mesh axis, Auto or Explicit. The loss is::

        (1 - e) (log Z - logits_y) + e mean_v (log Z - logits_v) + c (log Z)^2

    with `e = label_smoothing`, `c = z_loss`. The mean is over valid entries: neither `-inf` nor
    excluded by `vocab_where`. See `logitjax.losses` for what all losses take, return and raise.

    Args:
        label_smoothing: the weight `e` of the uniform distribution, in `[0, 1)`.
        z_loss: the weight `c` of the squared log-normaliser, which keeps logits from drifting.

    Returns:
        `[*batch]`, float32. `inf` if the label's entry is not valid, and nan if the label is
        outside the vocabulary (such as -100), so that it cannot go unnoticed; `masked_mean(loss,
        labels >= 0)` leaves out both the nan and its gradient.

    >>> import jax, numpy as np
    >>> logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    >>> [f"{loss:.3f}" for loss in jax.jit(cross_entropy)(logits, np.array([0, 2])).tolist()]
    ['0.693', '2.303']

    References:
        Szegedy et al., Rethinking the Inception architecture, 2016 (label smoothing; here uniform
        over valid entries). Chowdhery et al., PaLM, 2022, section 5 (z-loss, weight 1e-4).
    """
    logits = checks.as_float(logits, "logits", vocab_where)
    labels = jnp.asarray(labels)
    vocab = logits.shape[checks.axis(-1, logits.shape, "logits")]
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: expected the shape of logits without the vocabulary, {logits.shape[:-1]}, "
            f"got {labels.shape}"
        )
    smooth = not isinstance(label_smoothing, (int, float)) or label_smoothing != 0
    if isinstance(label_smoothing, (int, float)) and not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")

    first, size = 0, vocab
    if axis_name is not None:
        first = lax.axis_index(axis_name) * vocab
        size = lax.axis_size(axis_name) * vocab

    log_z = neginf_to_zero(logsumexp(logits, axis_name=axis_name))
    # Not a gather, which would move logits if a mesh splits the vocabulary.
    is_label = jnp.arange(vocab) + first == labels[..., None]
    label_logit = on_mesh.psum(jnp.where(is_label, logits, 0.0).sum(-1), axis_name)
    loss = log_z - label_logit
    if smooth:
        exists = logits != -jnp.inf
        total = on_mesh.psum(jnp.where(exists, logits, 0.0).sum(-1), axis_name)
        count = on_mesh.psum(exists.sum(-1), axis_name)
        uniform = log_z - total / jnp.maximum(count, 1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    if not isinstance(z_loss, (int, float)) or z_loss != 0:
        # Not with a zero weight: the square of a large normaliser is infinite.
        loss = loss + z_loss * jnp.square(log_z)
    return jnp.where((labels >= 0) & (labels < size), loss, jnp.nan)
