"""Unlearning losses that give the model something else to say: nothing at all, or noise."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from logitjax.losses import kl_divergence
from logitjax.ops import (
    Array,
    AxisName,
    Number,
    checks,
    log_softmax,
    logsumexp,
    neginf_to_zero,
    psum,
)
from logitjax.unlearning._losses import as_losses


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


def undial(
    logits: Float[Array, "*batch vocab"],
    reference_logits: Float[Array, "*batch vocab"],
    labels: Int[Array, "*batch"],
    *,
    beta: Number = 10.0,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*batch"]:
    """UNDIAL: distils the model from itself with the logit of the memorised token lowered.

    ::

        cross-entropy( softmax(reference - beta onehot(y)), softmax(logits) )

    Args:
        logits: `[*batch, vocab]`.
        reference_logits: the same shape, of the model before unlearning; no gradient.
        labels: `[*batch]`, the tokens to forget.
        beta: how far their logit is lowered.
        vocab_where: boolean, broadcastable to the logits: True for the entries that exist.
        axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis: that axis;
            labels count over the whole vocabulary.

    Returns:
        float32 `[*batch]`; nan where the label is outside the vocabulary, as in `cross_entropy`.

    Raises:
        TypeError: logits are not floating point or labels not integers.
        ValueError: different shapes.

    >>> jax.jit(undial)(jnp.zeros((1, 4)), jnp.zeros((1, 4)), jnp.array([2]))
    Array([1.386294...], dtype=float32)

    References:
        Dong et al., UNDIAL, 2024 (arXiv 2402.10052). OpenUnlearning's `UNDIAL` (beta 10, no retain
        loss) averages over all positions and lets a label of -100 name the token V - 100; here such
        labels give nan, for the caller's mask to leave out.
    """
    logits = checks.as_float(logits, "logits")
    reference = lax.stop_gradient(checks.as_float(reference_logits, "reference_logits"))
    checks.same_shape(logits, reference, "logits", "reference_logits")
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: expected shape {logits.shape[:-1]}, got {labels.shape}")
    vocab, first, size = logits.shape[-1], 0, logits.shape[-1]
    if axis_name is not None:
        first, size = lax.axis_index(axis_name) * vocab, lax.axis_size(axis_name) * vocab
    hit = jnp.arange(vocab) + first == labels[..., None]
    target = jnp.where(hit, reference - beta, reference)
    log_t = log_softmax(target, vocab_where=vocab_where, axis_name=axis_name)
    t = jnp.exp(log_t)
    entropy = -psum(jnp.where(t > 0, t * log_t, 0.0).sum(-1), axis_name)
    loss = kl_divergence(logits, target, vocab_where=vocab_where, axis_name=axis_name) + entropy
    return jnp.where((labels >= 0) & (labels < size), loss, jnp.nan)


def ce_u(
    logits: Float[Array, "*batch vocab"],
    labels: Int[Array, "*batch"],
    *,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*batch"]:
    """CE-U: distils the model from itself without the memorised token.

    Its gradient by the logits, `p_y (onehot(y) - q)`, fades as the token is forgotten.

    ::

        cross-entropy( q, softmax(logits) ),    q = softmax(logits, logit_y = -inf), a constant

    Args:
        logits: `[*batch, vocab]`.
        labels: `[*batch]`, the tokens to forget.
        vocab_where: boolean, broadcastable to the logits: True for the entries that exist.
        axis_name: as of `undial`.

    Returns:
        float32 `[*batch]`; nan where the label is outside the vocabulary.

    Raises:
        TypeError: logits are not floating point or labels not integers.
        ValueError: different shapes.

    >>> loss = jax.jit(ce_u)(jnp.array([[2.0, 1.0, 0.0], [200.0, 0.0, 0.0]]), jnp.array([0, 0]))
    >>> [f"{value:.5f}" for value in loss.tolist()]
    ['1.67655', '200.00000']

    References:
        Yang, CE-U: cross entropy unlearning, 2025 (arXiv 2503.01224); OpenUnlearning's `CEU`, which
        leaves out the first token of an answer.
    """
    beta = float("inf")
    return undial(logits, logits, labels, beta=beta, vocab_where=vocab_where, axis_name=axis_name)


def pdu(
    logits: Float[Array, "*batch vocab"], *, vocab_where: Bool[Array, "..."] | None = None
) -> Float[jax.Array, "*batch"]:
    """The forget loss of PDU, which flattens the logits of what is to be forgotten.

    It is 0 where all tokens are equally likely, and uses no label. Its retain loss is a constraint,
    see `UNLEARNING_METHODS`.

    ::

        (max_v logits_v - mean_v logits_v)^2

    Args:
        logits: `[*batch, vocab]`.
        vocab_where: boolean, broadcastable to the logits: True for the entries that exist, as those
            at `-inf` do not.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: the logits are not floating point or `vocab_where` not boolean.
        ValueError: `vocab_where` does not broadcast, or the vocabulary is empty.

    >>> jax.jit(pdu)(jnp.array([3.0, 1.0, -1.0]))
    Array(4., dtype=float32)

    References:
        Unlearning as a constrained problem by primal-dual updates, 2025 (arXiv 2506.05314);
        OpenUnlearning's `PDU`, which averages over all positions, prompt and padding included.
    """
    logits = checks.as_float(logits, "logits", vocab_where)
    checks.axis(-1, logits.shape, "logits")
    exists = logits != -jnp.inf
    count = jnp.maximum(exists.sum(-1), 1)
    mean = jnp.where(exists, logits, 0.0).sum(-1) / count
    return jnp.square(neginf_to_zero(logits.max(-1)) - mean)


def rmu(
    hidden: Float[Array, "*batch hidden"], target: Float[Array, "..."]
) -> Float[jax.Array, "*batch"]:
    """Representation misdirection: moves hidden states of one layer to a target.

    On what is to be forgotten the target is one random direction for all positions
    (`rmu_direction`); on what is to be kept, the hidden states before unlearning.

    ::

        mean_d (h_d - target_d)^2

    Args:
        hidden: `[*batch, hidden]`, after 8 of the 32 layers of a 7B model as published.
        target: `[hidden]`, or the shape of `hidden`; gets no gradient.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: arrays are not floating point.
        ValueError: `target` has another shape.

    >>> rmu(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([1.0, 0.0]))
    Array([2. , 0.5], dtype=float32)

    References:
        Li et al., The WMDP benchmark, 2024 (arXiv 2403.03218), section 4; OpenUnlearning's `RMU`
        (`EMBED_DIFF` is the retain term), which divides sums of sequences by counts of shape
        `[batch, 1]`: the mean of all sums times the mean of all inverse counts, for answers of
        different lengths neither a mean over tokens nor one over sequences.
    """
    hidden = checks.as_float(hidden, "hidden")
    target = lax.stop_gradient(as_losses(target, "target"))
    if target.shape not in (hidden.shape[-1:], hidden.shape):
        raise ValueError(
            f"target: expected shape {hidden.shape[-1:]} or that of hidden, {hidden.shape}, "
            f"got {target.shape}"
        )
    return jnp.square(hidden - target).mean(-1)


def rmu_direction(size: int, *, key: Array, scale: Number = 2.0) -> Float[jax.Array, " hidden"]:
    """The direction to which `rmu` moves what is to be forgotten: drawn once, then kept.

    ::

        c u / |u|,    u ~ uniform(0, 1)^d

    Args:
        size: size of the hidden states.
        key: PRNG key.
        scale: `c`. 2 in OpenUnlearning's TOFU runs, and 20 to 300 elsewhere, because it has to
            stand out against the layer's own norm.

    Returns:
        float32 `[size]`.

    >>> import numpy as np
    >>> direction = np.asarray(rmu_direction(8, key=jax.random.key(0)))
    >>> print(f"{np.linalg.norm(direction):.3f}", (direction > 0).all())
    2.000 True

    References:
        As `rmu`.
    """
    u = jax.random.uniform(key, (size,), jnp.float32)
    return scale * u / jnp.linalg.norm(u)
