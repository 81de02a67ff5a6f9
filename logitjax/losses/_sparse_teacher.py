import dataclasses
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from logitjax.losses._divergences import kl_terms
from logitjax.losses._linear_readout import Readout
from logitjax.losses._tail_sample import TailSample
from logitjax.losses.sweep import Head, ReadoutStatistic
from logitjax.losses.sweep._run import Options, weighted_or_each
from logitjax.ops import Array, AxisName, Number, TopK, checks, gather_at, logsumexp, neginf_to_zero

Tail = Literal["bucket", "renormalize"] | TailSample

# The smallest mass 1 - sum(p) can resolve in float32.
_LEAST_MASS = 2.0**-24


def sparse_kl_divergence(
    student: Float[Array, "*batch vocab"] | Readout,
    teacher: TopK,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    tail: Tail = "bucket",
    temperature: Number = 1.0,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*batch"]:
    """KL divergence to a teacher of which only top k logits and log-normaliser are known.

    The teacher's probabilities of its top k tokens are exact, because the log-normaliser is that of
    the whole vocabulary. Everything else is one bucket, whose mass is exact too: this is the KL
    divergence between the two distributions after merging the tail, hence a lower bound of the full
    divergence, and zero only if the student agrees on all k tokens. By `tail`::

        bucket        sum_{i<=k} p_i log(p_i / q_i) + p_rest log(p_rest / q_rest),
                      p_rest = 1 - sum_{i<=k} p_i,  q_rest = 1 - sum_{i<=k} q_i
        renormalize   T^2 KL of both softmaxes over the k tokens alone, logits / T
        TailSample    sum_{i<=k} p_i log(p_i / q_i) + mean_s p_s / d_s log(p_s / q_s)
                      reverse: sum_{i<=k} q_i log(q_i / p_i) + q_rest
                               + mean_s q_s / d_s (log(q_s / p_s) - 1)

    With `m` tokens sampled from a distribution `d` of the tail (`TailSample.draw`), of the teacher
    or the student, now or some steps ago, the last is an unbiased estimate of the full divergence,
    and so is its gradient; the value at a single position may be negative. For the reverse
    divergence sample from the student, at its own top k: the weights of the teacher's samples are
    unbounded. See `logitjax.losses` for what all losses take, return and raise.

    Args:
        student: logits `[*batch, vocab]`, or the student's `Readout` at the *teacher's* indices,
            followed by the indices of the sample.
        teacher: `TopK` with k entries, its largest or any others, such as the student's. Gets no
            gradient. Without `log_z` it can only be compared with 'renormalize'.
        tail: 'bucket'; 'renormalize', which ignores the tail; or a `TailSample` `[*batch, m]`,
            which gets no gradient.
        temperature: only with 'renormalize': the mass of the tail is known at temperature 1 only.

    Returns:
        `[*batch]`, float32. Tail masses below 2^-24 count as 2^-24, the resolution of float32. nan
        if a `Readout` was read at other ids, or if, under `jit`, a teacher's id is outside the
        student's vocabulary.

    Raises:
        TypeError: the student is a `TopK`, whose tokens are not those of the teacher.
        ValueError: unknown `direction` or `tail`, shapes that do not fit, or a temperature without
            'renormalize'.

    >>> import jax, numpy as np
    >>> from logitjax.ops import TopK
    >>> student, teacher = np.log(np.full(4, 0.25)), np.log([0.5, 0.25, 0.125, 0.125])
    >>> divergence = jax.jit(lambda s, t: sparse_kl_divergence(s, TopK.of(t, 2)))
    >>> print(f"{divergence(student, teacher):.4f}")
    0.1733

    References:
        DistillKit keeps top logits with the same log-normaliser. MaxText keeps none, and its loss,
        like others that drop the tail, is 'renormalize'.
    """
    _check(direction, tail, temperature)
    _check_teacher(teacher, tail)
    expected = _ids(teacher, tail)
    if isinstance(student, TopK):
        # Compared by rank, the tokens of student and teacher would differ.
        raise TypeError("student: expected logits, or a Readout at the teacher's ids, got a TopK")
    if isinstance(student, Readout):
        if student.gathered is None:
            raise ValueError("student.gathered: expected logits at the teacher's ids, got None")
        gathered, log_z = student.gathered, student.log_z
    else:
        logits = checks.as_float(student, "student", vocab_where)
        log_z = logsumexp(logits, axis_name=axis_name)
        checks.shapes(
            **{"teacher.indices": (expected, "int *batch k"), "student": (logits, "float *batch v")}
        )
        vocab = logits.shape[-1] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
        checks.ids(expected, vocab, "teacher.indices")
        gathered = gather_at(logits, expected, axis_name=axis_name)
    if gathered.shape != expected.shape:
        raise ValueError(
            f"student: expected the teacher's batch shape and entries, {expected.shape}, "
            f"got {gathered.shape}"
        )
    if isinstance(student, Readout) and student.ids is not None:
        # A readout at other ids would be compared with the wrong tokens.
        same = (jnp.asarray(student.ids) == expected).all(-1, keepdims=True)
        gathered = jnp.where(same, gathered, jnp.nan)
    if tail == "renormalize":
        gathered = gathered / temperature
        return _renormalised_kl(gathered, teacher.values, temperature, direction)
    drawn = (tail.values, tail.log_probs) if isinstance(tail, TailSample) else None
    return _sparse_kl(gathered, log_z, teacher, drawn, direction)


def linear_sparse_kl_divergence(
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    teacher: TopK,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    tail: Tail = "bucket",
    **options: Unpack[Options],
) -> Float[jax.Array, "*losses"]:
    """`sparse_kl_divergence` of a linear head's logits, which are never held as a whole.

    It costs as much as `linear_cross_entropy`: the sweep over the vocabulary picks the student's
    logits at the teacher's ids as it visits them. `linear_fused_loss` adds the labels'
    cross-entropy in the same sweep. See `logitjax.losses` for what all losses take, return and
    raise.

    Args:
        teacher: `TopK`, `[*batch, k]`. Gets no gradient.
        temperature: only with `tail='renormalize'`.

    >>> import jax, numpy as np
    >>> from logitjax.ops import TopK
    >>> one, head = np.ones(1), np.log([[0.25, 0.25, 0.25, 0.25]])
    >>> divergence = jax.jit(lambda h, w, t: linear_sparse_kl_divergence(h, w, TopK.of(t, 2)))
    >>> print(f"{divergence(one, head, np.log([0.5, 0.25, 0.125, 0.125])):.4f}")
    0.1733
    """
    temperature = options.get("temperature", 1.0)
    _check(direction, tail, temperature)
    _check_teacher(teacher, tail)
    checks.shapes(hidden=(hidden, "float *batch hidden"))
    head = Head.of(head).resolve(jnp.shape(hidden)[-1])
    vocab = head.vocab_size(options.get("axis_name"))
    checks.ids(_ids(teacher, tail), vocab, "teacher.indices")
    tokens = {"ids": _ids(teacher, tail), "values": jnp.asarray(teacher.values)}
    if tail == "renormalize":
        dtype = jnp.promote_types(tokens["values"].dtype, jnp.float32)
        scale = jnp.asarray(temperature, dtype)
        tokens["temperature"] = jnp.broadcast_to(scale, tokens["values"].shape[:-1])
    else:
        tokens["log_z"] = jnp.asarray(teacher.log_z)
    if isinstance(tail, TailSample):
        tokens["drawn"] = jax.tree.map(jnp.asarray, (tail.values, tail.log_probs))
    statistic = _SparseKL(
        ids=tokens["ids"].shape[-1],
        direction=direction,
        renormalize=tail == "renormalize",
        vocab=vocab,
    )
    return weighted_or_each(statistic, hidden, head, tokens=tokens, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SparseKL(ReadoutStatistic):
    direction: str
    renormalize: bool
    vocab: int

    def losses(self, outputs: Any, tokens: Any) -> jax.Array:
        values, ids = tokens["values"], tokens["ids"]
        # The sweep never comes to an id that is outside of the vocabulary.
        existing = (ids >= 0) & (ids < self.vocab)
        gathered = jnp.where(existing, outputs.gathered, jnp.nan)
        if self.renormalize:
            return _renormalised_kl(gathered, values, tokens["temperature"], self.direction)
        top = TopK(values, ids[..., : values.shape[-1]], tokens["log_z"])
        return _sparse_kl(gathered, outputs.log_z, top, tokens.get("drawn"), self.direction)


def _ids(teacher: TopK, tail: Tail) -> jax.Array:
    """Ids at which the student's logits are needed: the top k, then the samples of the tail."""
    ids = jnp.asarray(teacher.indices)
    if isinstance(tail, TailSample):
        return jnp.concatenate([ids, jnp.asarray(tail.indices)], axis=-1)
    return ids


def _check_teacher(teacher: TopK, tail: Tail) -> None:
    arrays: dict[str, tuple[Any, str]] = {
        "teacher.values": (teacher.values, "float *batch k"),
        "teacher.indices": (teacher.indices, "int *batch k"),
    }
    if teacher.log_z is not None:
        arrays["teacher.log_z"] = (teacher.log_z, "float *batch")
    elif tail != "renormalize":
        raise ValueError(
            "teacher.log_z: expected the log-normaliser, or tail='renormalize' without it, got None"
        )
    if isinstance(tail, TailSample):
        arrays["tail.values"] = (tail.values, "float *batch samples")
        arrays["tail.indices"] = (tail.indices, "int *batch samples")
        if tail.log_probs is not None:
            arrays["tail.log_probs"] = (tail.log_probs, "float *batch samples")
    checks.shapes(**arrays)


def _check(direction: str, tail: Tail, temperature: Number) -> None:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction: expected 'forward' or 'reverse', got {direction!r}")
    sampled = isinstance(tail, TailSample)
    if not sampled and tail not in ("bucket", "renormalize"):
        raise ValueError(f"tail: expected 'bucket', 'renormalize' or a TailSample, got {tail!r}")
    checks.positive(temperature, "temperature")
    if tail != "renormalize" and not (isinstance(temperature, int | float) and temperature == 1):
        raise ValueError(
            "temperature: expected 1 without tail='renormalize': the mass outside the top k is "
            f"known at temperature 1 only; got {temperature}"
        )


def _renormalised_kl(
    gathered: jax.Array, values: Array, temperature: Any, direction: str
) -> jax.Array:
    """`gathered`: the student's logits at the teacher's ids, already divided by the temperature."""
    values = jax.lax.stop_gradient(jnp.asarray(values).astype(gathered.dtype))
    scale = jnp.asarray(temperature, gathered.dtype)
    values = values / (scale[..., None] if scale.ndim else scale)
    log_p = values - neginf_to_zero(logsumexp(values))[..., None]
    log_q = gathered - neginf_to_zero(logsumexp(gathered))[..., None]
    return jnp.square(scale) * _kl(log_p, log_q, direction)


def _sparse_kl(
    gathered: jax.Array, log_z: jax.Array, teacher: TopK, drawn: Any, direction: str
) -> jax.Array:
    """`gathered`: the student's logits at the teacher's ids, then at the samples.

    `drawn`: None, or the teacher's logits at the samples and the samples' log-probabilities.
    """
    values = jax.lax.stop_gradient(jnp.asarray(teacher.values).astype(gathered.dtype))
    teacher_log_z = jax.lax.stop_gradient(jnp.asarray(teacher.log_z).astype(gathered.dtype))
    log_p = _of_teacher(values, teacher_log_z)
    # The same check for the student: beside an infinite logit no other would have any mass.
    log_z = jnp.where(log_z == jnp.inf, jnp.nan, neginf_to_zero(log_z))
    log_q = gathered - log_z[..., None]
    if drawn is not None:
        k, (values, log_law) = log_p.shape[-1], jax.lax.stop_gradient(drawn)
        teachers = log_p, _of_teacher(values, teacher_log_z)
        return _estimate(teachers, (log_q[..., :k], log_q[..., k:]), log_law, direction)
    # The rest is one bucket; merging entries can only lower a divergence.
    log_p, log_q = _with_tail(log_p), _with_tail(log_q)
    return _kl(log_p, log_q, direction)


def _of_teacher(values: jax.Array, log_z: jax.Array) -> jax.Array:
    # An infinite logit, or an infinite normaliser beside a finite logit.
    wrong = (jnp.isinf(log_z)[..., None] & (values != -jnp.inf)) | (values == jnp.inf)
    return jnp.where(wrong, jnp.nan, values - neginf_to_zero(log_z)[..., None])


def _estimate(teacher: Any, student: Any, log_law: Any, direction: str) -> jax.Array:
    """Estimate the divergence from the top k and from importance-weighted samples."""
    (log_p, drawn_p), (log_q, drawn_q) = teacher, student
    # Sampled from the teacher.
    if log_law is None:
        rest = jnp.maximum(1.0 - jnp.exp(log_p).sum(-1, keepdims=True), 0.0)
        log_law = jnp.where(drawn_p == -jnp.inf, -jnp.inf, drawn_p - jnp.log(rest))
    over, under = (drawn_p, drawn_q) if direction == "forward" else (drawn_q, drawn_p)
    # There are no samples if nothing is left; an entry that either lacks has no logarithm.
    present, both = log_law != -jnp.inf, (over != -jnp.inf) & (under != -jnp.inf)
    weight = jnp.exp(jnp.where(present & (over != -jnp.inf), over - log_law, -jnp.inf))
    gap = jnp.where(both, over, 0.0) - jnp.where(both, under, 0.0)
    if direction == "reverse":
        gap = gap - 1.0
    lost = jnp.where(weight > 0, jnp.inf, 0.0)
    tail = jnp.where(both, weight * gap, lost).mean(-1)
    if direction == "reverse":
        # Subtracted in the samples' term and added exactly, which reduces noise.
        tail = tail + jnp.maximum(1.0 - jnp.exp(log_q).sum(-1), 0.0)
    # If nothing was left to sample, the other's mass in the tail still has a cost.
    bucket = _kl(_with_tail(log_p)[..., -1:], _with_tail(log_q)[..., -1:], direction)
    return _kl(log_p, log_q, direction) + jnp.where(present.any(-1), tail, bucket)


def _with_tail(log_probs: jax.Array) -> jax.Array:
    rest = jnp.log(jnp.maximum(1.0 - jnp.exp(log_probs).sum(-1, keepdims=True), _LEAST_MASS))
    return jnp.concatenate([log_probs, rest], -1)


def _kl(log_p: jax.Array, log_q: jax.Array, direction: str) -> jax.Array:
    over, under = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    return kl_terms(over, under).sum(-1)
