from typing import Literal, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.losses.sweep import Head, KLStatistic, MixtureStatistic
from logitjax.losses.sweep._run import Options, weighted_or_each
from logitjax.ops import Array, checks


def linear_kl_divergence(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    teacher_hidden: Float[Array, "*batch teacher_hidden"],
    teacher_head: Head | Float[Array, "teacher_rows teacher_columns"],
    *,
    direction: Literal["forward", "reverse"] = "forward",
    **options: Unpack[Options],
) -> Float[jax.Array, "*losses"]:
    """`kl_divergence` of two linear heads' logits, which are never held as a whole.

    Blocks of the shared vocabulary are visited in both heads, with online sums for both softmaxes
    and the expected log-ratio: one sweep for the value, one for the gradient. The teacher gets no
    gradient, and nothing is kept for it. Both directions cost the same. The value is `T^2
    KL(teacher || student)`, or `T^2 KL(student || teacher)`, of `logits / T`. See `logitjax.losses`
    for what all losses take, return and raise.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1,))
    >>> head, teacher_head = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    >>> print(f"{linear_kl_divergence(one, head, one, teacher_head):.4f}")
    0.1308
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction: expected 'forward' or 'reverse', got {direction!r}")
    statistic = KLStatistic(reverse=direction == "reverse")
    teacher = (teacher_hidden, teacher_head)
    loss = weighted_or_each(statistic, hidden, head, teacher=teacher, **options)
    # Gradients through softmax(logits / T) shrink as 1 / T^2 (Hinton et al., 2015, section 2).
    return loss * jnp.square(jnp.asarray(options.get("temperature", 1.0), loss.dtype))


def linear_generalized_jensen_shannon(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    teacher_hidden: Float[Array, "*batch teacher_hidden"],
    teacher_head: Head | Float[Array, "teacher_rows teacher_columns"],
    *,
    beta: float | int = 0.5,
    **options: Unpack[Options],
) -> Float[jax.Array, "*losses"]:
    """`generalized_jensen_shannon` of two linear heads' logits, which are never held as a whole.

    The mixture needs both normalisers before its first term, so the value takes two sweeps over the
    vocabulary and the gradient a third; with `weights` there is one. For `beta` in `[0, 1]`::

        m = beta p + (1 - beta) q
        beta KL(p || m) + (1 - beta) KL(q || m),    KL(p || q) at beta = 0, KL(q || p) at beta = 1

    See `logitjax.losses` for what all losses take, return and raise.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1,))
    >>> head, teacher_head = jnp.array([[9.0, -90.0]]), jnp.array([[-90.0, 9.0]])
    >>> print(f"{linear_generalized_jensen_shannon(one, head, one, teacher_head):.4f}")
    0.6931
    """
    checks.between(beta, 0, 1, "beta")
    # At both ends it is a KL divergence, which takes one sweep.
    statistic = KLStatistic(reverse=beta == 1)
    if beta not in (0, 1):
        shares = (float(beta), 1 - float(beta))
        statistic = MixtureStatistic(beta=shares[0], weights=shares)
    teacher = (teacher_hidden, teacher_head)
    return weighted_or_each(statistic, hidden, head, teacher=teacher, **options)
