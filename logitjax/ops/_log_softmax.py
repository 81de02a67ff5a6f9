import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from logitjax.ops import checks
from logitjax.ops._mesh import psum
from logitjax.ops._types import Array, AxisName


def logsumexp(
    logits: Float[Array, "..."],
    *,
    axis: int = -1,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "..."]:
    """Logarithm of the summed exponentials over the vocabulary.

    Entries that are `-inf` or excluded by `vocab_where` count as absent. A row without any entry
    gives `-inf`, with a gradient of zero rather than nan. ::

        log Z = m + log sum_v exp(logits_v - m),    m = max_v logits_v

    Args:
        logits: `[*batch, vocab]` (the vocabulary at `axis`).
        vocab_where: boolean, broadcastable to `logits`: True for the entries that exist.
        axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis: that axis.

    Returns:
        `[*batch]`, float32.

    Raises:
        TypeError: `logits` is not floating point or `vocab_where` not boolean.
        ValueError: `axis` is out of range or `vocab_where` does not broadcast.

    >>> import numpy as np
    >>> print(f"{jax.jit(logsumexp)(np.array([0.0, 0.0, -np.inf])):.3f}")
    0.693
    """
    logits = checks.as_float(logits, "logits", vocab_where)
    axis = checks.axis(axis, logits.shape, "logits")
    return _logsumexp(logits, axis, axis_name)


def log_softmax(
    logits: Float[Array, "..."],
    *,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "..."]:
    """Log-probabilities over the vocabulary, `-inf` for entries that do not exist.

    The vocabulary is the last axis; arguments and errors are those of `logsumexp`. ::

        log p_v = logits_v - log Z

    Returns:
        The shape of `logits`, float32. A row without any entry is `-inf` throughout.

    >>> import numpy as np
    >>> np.asarray(jax.jit(log_softmax)(np.array([0.0, 0.0, -np.inf]))).round(4)
    array([-0.6931, -0.6931,    -inf], dtype=float32)
    """
    logits = checks.as_float(logits, "logits", vocab_where)
    log_z = _logsumexp(logits, checks.axis(-1, logits.shape, "logits"), axis_name)
    return logits - neginf_to_zero(log_z)[..., None]


def soft_cap(logits: jax.Array, cap: float) -> jax.Array:
    """Bounds logits smoothly by `cap tanh(logits / cap)`; `-inf` stays `-inf`."""
    # The formula maps -inf to a finite -cap: an absent entry would get a probability.
    return jnp.where(logits == -jnp.inf, -jnp.inf, cap * jnp.tanh(logits / cap))


def neginf_to_zero(values: jax.Array) -> jax.Array:
    """Replace `-inf`, which marks an absent entry, by zero without a gradient.

    `inf` and nan stay, so that results show that something went wrong.
    """
    return jnp.where(values == -jnp.inf, 0.0, values)


# With a custom rule the derivative is one pass, exp(logits - log Z), over logits that are kept
# anyway. Autodiff would also keep exp(logits - max) from the forward pass.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _logsumexp(logits: jax.Array, axis: int, axis_name: AxisName | None) -> jax.Array:
    peak = logits.max(axis)
    if axis_name is not None:
        peak = lax.pmax(peak, axis_name)
    # A row of -inf: -inf - -inf would be nan.
    peak = jnp.where(jnp.isinf(peak), 0.0, peak)
    total = psum(jnp.exp(logits - jnp.expand_dims(peak, axis)).sum(axis), axis_name)
    return jnp.log(total) + peak


@_logsumexp.defjvp
def _logsumexp_jvp(
    axis: int, axis_name: AxisName | None, primals: tuple, tangents: tuple
) -> tuple[jax.Array, jax.Array]:
    (logits,), (tangent,) = primals, tangents
    log_z = _logsumexp(logits, axis, axis_name)
    probs = jnp.exp(logits - jnp.expand_dims(neginf_to_zero(log_z), axis))
    return log_z, psum((probs * tangent).sum(axis), axis_name)
