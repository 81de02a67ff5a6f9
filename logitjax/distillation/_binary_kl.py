import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from logitjax.ops import Array, AxisName, Number, checks
from logitjax.ops import mesh as on_mesh

Reduction = Literal["sum", "mean"]


@jax.custom_jvp
def _log_cosh(x: jax.Array) -> jax.Array:
    """`log(cosh(x))`: exact to float32 near 0, finite at any size."""
    size = jnp.abs(x)
    # Both branches are computed: sinh of a large number would be inf, and its gradient nan.
    near = jnp.minimum(size, 1.0)
    small = jnp.log1p(2.0 * jnp.square(jnp.sinh(near / 2.0)))
    large = size + jnp.log1p(jnp.exp(-2.0 * size)) - math.log(2.0)
    return jnp.where(size < 1.0, small, large)


@_log_cosh.defjvp
def _log_cosh_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return _log_cosh(x), jnp.tanh(x) * dx


def bernoulli_kl(student_logit: jax.Array, teacher_logit: jax.Array) -> jax.Array:
    """Elementwise `KL(Bern(sigmoid(teacher)) || Bern(sigmoid(student)))`, finite at any gap."""

    def answer(student: jax.Array, teacher: jax.Array) -> jax.Array:
        p = jax.nn.sigmoid(teacher)
        gap = jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(student)
        # A class of probability zero has no weight, even if the gap is infinite.
        return jnp.where(p == 0, 0.0, p * gap)

    return answer(student_logit, teacher_logit) + answer(-student_logit, -teacher_logit)


def _by_class(
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    logits: tuple[Array, Array],
    classes: tuple[Array | None, AxisName | None],
    temperature: Number,
    reduction: str,
) -> jax.Array:
    """`t^2` times the sum or mean over classes of a loss of the logits divided by temperature t."""
    vocab_where, axis_name = classes
    student = checks.as_float(logits[0], "student_logits")
    teacher = jax.lax.stop_gradient(checks.as_float(logits[1], "teacher_logits"))
    pair = {"student_logits": (student, "any *same"), "teacher_logits": (teacher, "any *same")}
    checks.shapes(**pair)
    checks.axis(-1, student.shape, "student_logits")
    checks.where(vocab_where, student.shape, "vocab_where")
    checks.positive(temperature, "temperature")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    keep = (student != -jnp.inf) & (teacher != -jnp.inf)
    if vocab_where is not None:
        keep = keep & vocab_where
    # Zeros in place of -inf, whose difference would be nan and so would its gradient. A teacher
    # logit of +inf is an error of the teacher, not certainty.
    teacher = jnp.where(teacher == jnp.inf, jnp.nan, teacher)
    student, teacher = jnp.where(keep, student, 0.0), jnp.where(keep, teacher, 0.0)
    values = jnp.square(jnp.asarray(temperature)) * loss(
        student / temperature, teacher / temperature
    )
    total = on_mesh.psum(jnp.where(keep, values, 0.0).sum(-1), axis_name)
    if reduction == "sum":
        return total
    return total / jnp.maximum(on_mesh.psum(keep.sum(-1), axis_name), 1)


def binary_kl(
    student_logits: Float[Array, "..."],
    teacher_logits: Float[Array, "..."],
    *,
    temperature: Number = 2.0,
    reduction: Reduction = "sum",
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "..."]:
    """Treat every class as its own yes-or-no question and match the teacher's answers.

    Unlike softmax distillation this pins the absolute logits: adding a constant to the student's
    logits changes the loss. Its gradient in a student logit is `temperature * (sigmoid(z_s / t) -
    sigmoid(z_t / t))`. The teacher gets no gradient.

    ::

        t^2 * sum_c KL( Bern(sigmoid(z_t[c] / t)) || Bern(sigmoid(z_s[c] / t)) )

    Args:
        student_logits, teacher_logits: `[*batch, classes]`; absolute logits, not log-probabilities.
        reduction: over classes: `'sum'` as published, which grows with their number, or `'mean'`.
        vocab_where: the classes to compare. A class at `-inf` on either side is left out as well.
        axis_name: mesh axis over which the classes are split, inside `shard_map`.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: logits are not floating point.
        ValueError: different shapes, a temperature that is not positive, an unknown reduction.

    >>> jax.jit(binary_kl)(jnp.array([[1e4, 0.0]]), jnp.array([[0.0, 0.0]]))
    Array([9997...], dtype=float32)

    References:
        Yang et al., Dual-Head Knowledge Distillation (arXiv 2411.08937), BinaryKL. The released
        code takes logs of clamped float32 probabilities, which are infinite for logits above about
        17; this function uses log-sigmoids.
    """
    logits, classes = (student_logits, teacher_logits), (vocab_where, axis_name)
    return _by_class(bernoulli_kl, logits, classes, temperature, reduction)


def binary_kl_norm(
    student_logits: Float[Array, "..."],
    teacher_logits: Float[Array, "..."],
    *,
    temperature: Number = 2.0,
    reduction: Reduction = "sum",
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "..."]:
    """Regress the teacher's logits with the smooth L1 loss of the published second head.

    It was derived as the binary divergence between one half and `sigmoid((z_s - z_t) / t)`,
    which is log cosh of half that gap: `gap^2 / 8` for gaps well below the temperature (and then
    independent of it), `t * |gap| / 2` beyond. The temperature is only the width of the quadratic
    part. The gradient is `(t / 2) * tanh(gap / (2 t))`.

    ::

        t^2 * sum_c log cosh( (z_s[c] - z_t[c]) / (2 t) )

    Arguments, result and errors are those of `binary_kl`; the teacher's logits are absolute.

    >>> jax.jit(binary_kl_norm)(jnp.array([[2.0, -1.0]]), jnp.array([[2.0, -1.0]]))
    Array([0.], dtype=float32)

    References:
        Yang et al., Dual-Head Knowledge Distillation (arXiv 2411.08937), BinaryKL-Norm; the closed
        form is ours and agrees with the released code where that is finite.
    """
    half_gap = lambda student, teacher: _log_cosh((student - teacher) / 2.0)  # noqa: E731
    logits, classes = (student_logits, teacher_logits), (vocab_where, axis_name)
    return _by_class(half_gap, logits, classes, temperature, reduction)
