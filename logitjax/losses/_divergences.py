from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from logitjax.ops import Array, AxisName, Number, checks, log_softmax
from logitjax.ops import mesh as on_mesh


def kl_divergence(
    student_logits: Float[Array, "..."],
    teacher_logits: Float[Array, "..."],
    *,
    direction: Literal["forward", "reverse"] = "forward",
    temperature: Number = 1.0,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "..."]:
    """Kullback-Leibler divergence between teacher and student, scaled by the squared temperature.

    With `p` the teacher's and `q` the student's softmax of `logits / T`::

        forward   T^2 sum_v p_v (log p_v - log q_v)     covers all of the teacher's mass
        reverse   T^2 sum_v q_v (log q_v - log p_v)     seeks one of its modes

    `T^2` keeps the scale of the gradient when the temperature changes. See `logitjax.losses` for
    what all losses take, return and raise.

    Returns:
        `[*batch]`, float32. `inf` where the first distribution has mass on an entry that is `-inf`
        in the second; the gradient is then that of the other entries, and finite.

    >>> import jax.numpy as jnp
    >>> student = jnp.log(jnp.array([0.5, 0.5]))
    >>> teacher = jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{kl_divergence(student, teacher):.4f}")
    0.1308
    >>> print(f"{kl_divergence(student, teacher, direction='reverse'):.4f}")
    0.1438

    References:
        Hinton, Vinyals, Dean, Distilling the knowledge in a neural network, 2015 (section 2, T^2).
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction: expected 'forward' or 'reverse', got {direction!r}")
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, vocab_where, axis_name)
    first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    scale = jnp.square(jnp.asarray(temperature, log_q.dtype))  # Hinton's T^2
    return scale * on_mesh.psum(kl_terms(first, second).sum(-1), axis_name)


def generalized_jensen_shannon(
    student_logits: Float[Array, "..."],
    teacher_logits: Float[Array, "..."],
    *,
    beta: float | int = 0.5,
    temperature: Number = 1.0,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "..."]:
    """Generalised Jensen-Shannon divergence between teacher and student.

    With `p` the teacher's and `q` the student's softmax of `logits / T`::

        m = beta p + (1 - beta) q
        beta KL(p || m) + (1 - beta) KL(q || m)        0 < beta < 1
        KL(p || q)                                     beta = 0, forward
        KL(q || p)                                     beta = 1, reverse

    Towards the ends the formula tends to 0, and divided by beta or 1 - beta to these two
    divergences. As in TRL, the ends are the divergences themselves, and nothing is multiplied by
    `T^2`. See `logitjax.losses` for what all losses take, return and raise.

    Args:
        beta: the teacher's weight, in `[0, 1]`, a Python number.

    Returns:
        `[*batch]`, float32: finite for 0 < beta < 1, like `kl_divergence` at the ends.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([0.0, -jnp.inf])
    >>> teacher = jnp.array([-jnp.inf, 0.0])
    >>> print(f"{generalized_jensen_shannon(student, teacher):.4f}")
    0.6931

    References:
        Agarwal et al., On-policy distillation of language models, 2024 (arXiv 2306.13649), and
        TRL's `generalized_jsd_loss`, whose convention this is. Some ports swap the two weights and
        the two ends; they only agree at beta = 1/2.
    """
    checks.between(beta, 0, 1, "beta")
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, vocab_where, axis_name)
    if beta == 0:
        terms = kl_terms(log_p, log_q)
    elif beta == 1:
        terms = kl_terms(log_q, log_p)
    else:
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        mixture = beta * p + (1 - beta) * q
        exists = mixture > 0
        log_m = jnp.log(jnp.where(exists, mixture, 1.0))
        # An entry that one of them lacks has no logarithm there, but no weight either.
        safe_p = jnp.where(exists & (log_p != -jnp.inf), log_p, log_m)
        safe_q = jnp.where(exists & (log_q != -jnp.inf), log_q, log_m)
        terms = beta * p * (safe_p - log_m) + (1 - beta) * q * (safe_q - log_m)
    return on_mesh.psum(terms.sum(-1), axis_name)


def _log_probs(
    student_logits: Array,
    teacher_logits: Array,
    temperature: Number,
    vocab_where: Array | None,
    axis_name: AxisName | None,
) -> tuple[jax.Array, jax.Array]:
    student = checks.as_float(student_logits, "student_logits")
    teacher = checks.as_float(teacher_logits, "teacher_logits")
    checks.axis(-1, student.shape, "student_logits")
    if student.shape != teacher.shape:
        message = f"teacher_logits: expected the shape of student_logits, {student.shape}"
        hint = ""
        if student.ndim == teacher.ndim and student.shape[-1] != teacher.shape[-1]:
            hint = "; across vocabularies use universal_logit_distance or graph_on_logits"
        raise ValueError(f"{message}, got {teacher.shape}{hint}")
    checks.positive(temperature, "temperature")

    def log_probs(logits: jax.Array) -> jax.Array:
        return log_softmax(logits / temperature, vocab_where=vocab_where, axis_name=axis_name)

    return log_probs(student), log_probs(teacher)


def kl_terms(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Elementwise `p (log p - log q)`."""
    p = jnp.exp(log_p)
    # Mask before subtracting: -inf - -inf is nan, and so is zero times it.
    both = (log_p != -jnp.inf) & (log_q != -jnp.inf)
    ratio = jnp.where(both, log_p, 0.0) - jnp.where(both, log_q, 0.0)
    return jnp.where(both, p * ratio, jnp.where(p > 0, jnp.inf, 0.0))
