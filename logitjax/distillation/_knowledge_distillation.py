import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax.distillation._binary_kl import bernoulli_kl
from logitjax.losses import kl_divergence
from logitjax.ops import (
    Array,
    AxisName,
    Number,
    checks,
    gradient_where,
    log_softmax,
    logsumexp,
    masked_mean,
)
from logitjax.ops import mesh as on_mesh


def _softened(
    student_logits: Array, teacher_logits: Array, temperature: Number
) -> tuple[jax.Array, jax.Array]:
    """Divide both logits by the temperature; the teacher's get no gradient."""
    student = checks.as_float(student_logits, "student_logits")
    teacher = jax.lax.stop_gradient(checks.as_float(teacher_logits, "teacher_logits"))
    pair = {"student_logits": (student, "any *same"), "teacher_logits": (teacher, "any *same")}
    checks.shapes(**pair)
    checks.positive(temperature, "temperature")
    return student / temperature, teacher / temperature


def knowledge_distillation(
    student_logits: Float[Array, "..."],
    teacher_logits: Float[Array, "..."],
    *,
    temperature: Number = 4.0,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "..."]:
    """Hinton's distillation: match the teacher's softened class probabilities.

    The factor `T^2` keeps the gradient's scale at any temperature. The teacher gets no gradient.

    ::

        T^2 * KL( softmax(z_t / T) || softmax(z_s / T) )

    Args:
        student_logits, teacher_logits: `[*batch, classes]`.
        temperature: 4 with weights .1 (labels) and .9 on CIFAR; 1 with .5 and .5 on ImageNet.
        vocab_where: the classes that exist.
        axis_name: mesh axis over which the classes are split, inside `shard_map`.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: logits are not floating point.
        ValueError: different shapes, or a temperature that is not positive.

    >>> jax.jit(knowledge_distillation)(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    Array([0., 0.], dtype=float32)

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (arXiv 1503.02531);
        defaults as in mdistiller.
    """
    # Gradients of softened targets shrink by 1 / T^2.
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    return jnp.square(jnp.asarray(temperature)) * kl_divergence(
        student, teacher, vocab_where=vocab_where, axis_name=axis_name
    )


def decoupled_knowledge_distillation(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
    temperature: Number = 4.0,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*batch"]:
    """DKD: weight "is it the label" and "which of the others" separately.

    Plain distillation weights the second part by the teacher's doubt, so a confident teacher says
    little about the other classes; here its weight is free.

    ::

        T^2 * ( target_weight * KL(Bern(p_t[y]) || Bern(p_s[y]))
              + other_weight  * KL(p_t without y || p_s without y) )

    Args:
        student_logits, teacher_logits: `[*batch, classes]`, as in `knowledge_distillation`.
        labels: the true classes; global numbers if classes are split over devices.
        target_weight: alpha of the paper.
        other_weight: beta of the paper: 8 by default, 2 or 6 for some published pairs.

    Returns:
        float32 `[*batch]`. Under `jit`, nan for labels out of range.

    Raises:
        TypeError: logits are not floating point, or labels not integers.
        ValueError: different shapes, a temperature that is not positive, or (outside of `jit`) a
            label out of range.

    >>> z = jnp.array([[2.0, 0.0, -1.0]])
    >>> loss = jax.jit(decoupled_knowledge_distillation)(z, z, jnp.array([0]))
    >>> print(f"{loss[0]:.4f}")
    0.0000

    References:
        Zhao et al., Decoupled Knowledge Distillation (CVPR 2022, arXiv 2203.08679), eq. 7. The
        released code masks the label by subtracting 1000 from its logit; here it is excluded.
    """
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    classes = student.shape[checks.axis(-1, student.shape, "student_logits")]
    labels = jnp.asarray(labels)
    if labels.shape != student.shape[:-1]:
        raise ValueError(f"labels: expected the shape {student.shape[:-1]}, got {labels.shape}")
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    checks.ids(labels, classes * shards, "labels")
    checks.where(vocab_where, student.shape, "vocab_where")
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * classes  # of this shard
    ids = first + jax.lax.broadcasted_iota(jnp.int32, student.shape, student.ndim - 1)
    target = ids == labels[..., None]
    others = ~target if vocab_where is None else ~target & vocab_where

    def sides(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The label's logit and the log-sum-exp of all others; -inf if there are none."""
        # One shard has the label; the others add zeros.
        selected = on_mesh.psum(jnp.sum(jnp.where(target, logits, 0.0), -1), axis_name)
        selected = jnp.where(
            selected == jnp.inf, jnp.nan, selected
        )  # an error of the teacher, not certainty
        return selected, logsumexp(logits, vocab_where=others, axis_name=axis_name)

    def log_odds(label: jax.Array, rest: jax.Array) -> jax.Array:
        # Masked before they are subtracted: -inf less -inf is nan, and so is its gradient.
        both = (label != -jnp.inf) & (rest != -jnp.inf)
        odds = jnp.where(both, label, 0.0) - jnp.where(both, rest, 0.0)
        return jnp.where(both, odds, jnp.where(label == -jnp.inf, -jnp.inf, jnp.inf))

    of_teacher = sides(teacher)
    target_part = bernoulli_kl(log_odds(*sides(student)), log_odds(*of_teacher))
    # A teacher without any class has nothing to match.
    has_class = (of_teacher[0] != -jnp.inf) | (of_teacher[1] != -jnp.inf)
    target_part = jnp.where(has_class, target_part, 0.0)
    other_part = kl_divergence(student, teacher, vocab_where=others, axis_name=axis_name)
    loss = target_weight * target_part + other_weight * other_part
    existing = (labels >= 0) & (labels < classes * shards)
    return jnp.where(existing, jnp.square(jnp.asarray(temperature)) * loss, jnp.nan)


def standardize_logits(
    logits: Float[Array, "..."],
    *,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
    epsilon: float = 1e-7,
) -> Float[jax.Array, "..."]:
    """Scale each row of logits to mean 0 and standard deviation 1, before a distillation loss.

    A student then has to match the shape of the teacher's logits, but not their scale. Apply it to
    both sides and pass the result to `knowledge_distillation` with the base temperature 2.

    ::

        (z - mean(z)) / (std(z) + epsilon)        std divides by the number of classes - 1

    Args:
        logits: `[*batch, classes]`.
        vocab_where: the classes that count; those at `-inf` never do. Excluded ones are `-inf` in
            the result. `axis_name` is that of `knowledge_distillation`.
        epsilon: as in the released code.

    Returns:
        float32, the shape of `logits`.

    >>> jax.jit(standardize_logits)(jnp.array([1.0, 2.0, 3.0]))
    Array([-0.9999999,  0.       ,  0.9999999], dtype=float32)

    References:
        Sun et al., Logit Standardization in Knowledge Distillation (CVPR 2024, arXiv 2403.01427).
    """
    logits = checks.as_float(logits, "logits")
    checks.axis(-1, logits.shape, "logits")
    checks.where(vocab_where, logits.shape, "vocab_where")
    keep = logits != -jnp.inf
    if vocab_where is not None:
        keep = keep & vocab_where
    safe = jnp.where(keep, logits, 0.0)

    def total(values: jax.Array) -> jax.Array:
        return on_mesh.psum(values.sum(-1, keepdims=True), axis_name)

    count = total(keep)
    deviation = jnp.where(keep, safe - total(safe) / jnp.maximum(count, 1), 0.0)
    # Unbiased, as in torch.
    variance = total(jnp.square(deviation)) / jnp.maximum(count - 1, 1)
    # The square root has no gradient where all logits are equal; deviations are 0 there anyway.
    std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return jnp.where(keep, deviation / (std + epsilon), -jnp.inf)


def _pearson_distance(a: jax.Array, b: jax.Array, keep: jax.Array, axis: int) -> jax.Array:
    count = jnp.maximum(keep.sum(axis, keepdims=True), 1)

    def centred(x: jax.Array) -> jax.Array:
        x = jnp.where(keep, x, 0.0)
        return jnp.where(keep, x - x.sum(axis, keepdims=True) / count, 0.0)

    a, b = centred(a), centred(b)
    square = jnp.square(a).sum(axis) * jnp.square(b).sum(axis)
    # Not `square > 0`: a nan has to stay one.
    flat = square == 0
    norms = jnp.where(flat, 0.0, jnp.sqrt(jnp.where(flat, 1.0, square)))
    return 1.0 - (a * b).sum(axis) / (norms + 1e-8)


def dist(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: Number = 1.0,
    where: Bool[Array, " batch"] | None = None,
) -> Float[jax.Array, " batch"]:
    """DIST: match the correlations of probabilities, within an example and within a class.

    The first term asks for the same ranking of classes in each example, the second for the same
    ranking of examples in each class. The second is a property of the whole batch: its mean over
    classes is added to every example's value, so that the mean over examples is the paper's loss.
    If the batch is split over devices under `jit`, it is computed over all of them.

    ::

        T^2 * ( inter_weight * (1 - pearson(p_s[i, :], p_t[i, :]))
              + intra_weight * mean_c (1 - pearson(p_s[:, c], p_t[:, c])) )

    Args:
        student_logits, teacher_logits: `[batch, classes]`.
        inter_weight: beta of the paper (2 on ImageNet).
        intra_weight: gamma of the paper (2 on ImageNet).
        temperature: 1 on ImageNet, 4 on CIFAR.
        where: the examples that count in the second term; the others get no gradient.

    Returns:
        float32 `[batch]`. Classes at `-inf` on both sides of all examples that count are left out.

    Raises:
        TypeError: logits are not floating point, or `where` not boolean.
        ValueError: shapes that differ or are not `[batch, classes]`, or a temperature not above 0.

    >>> z = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
    >>> [f"{abs(loss):.4f}" for loss in jax.device_get(jax.jit(dist)(z, z))]
    ['0.0000', '0.0000']

    References:
        Huang et al., Knowledge Distillation from A Stronger Teacher (NeurIPS 2022, arXiv
        2205.10536), eqs. 7 to 10 and the released code.
    """
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    # For sequences the second term would correlate positions, not examples.
    if student.ndim != 2 or not student.size:
        raise ValueError(f"student_logits: expected [batch, classes], got shape {student.shape}")
    present = jnp.ones(student.shape[:1], bool)
    if where is not None:
        checks.where(where, present.shape)
        present = jnp.broadcast_to(where, present.shape)
        student = gradient_where(student, present)
    exist = (student != -jnp.inf) | (teacher != -jnp.inf)
    # Not `jax.nn.softmax`, which returns nan for a row without any class.
    student, teacher = jnp.exp(log_softmax(student)), jnp.exp(log_softmax(teacher))
    # `[batch]`, over classes.
    inter = _pearson_distance(student, teacher, exist, -1)
    # `[classes]`, over the examples that count.
    intra = _pearson_distance(student, teacher, jnp.broadcast_to(present[:, None], exist.shape), 0)
    intra = masked_mean(intra, (present[:, None] & exist).any(0))
    return jnp.square(jnp.asarray(temperature)) * (inter_weight * inter + intra_weight * intra)
