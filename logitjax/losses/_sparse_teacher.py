"""Divergences from a teacher of which only the top logits are known, as a cache holds them."""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax.losses._tail_sample import TailSample
from logitjax.losses.sweep._call import Branch, sweep, vocabulary_size
from logitjax.losses.sweep._statistics import Readout, ReadoutStatistic
from logitjax.ops import (
    Array,
    AxisName,
    Number,
    TopK,
    as_float,
    check_positive,
    finite_or_zero,
    gather_at,
    logsumexp,
    mask_logits,
)

Tail = Literal["bucket", "renormalize", "sampled"]

# The smallest mass 1 - sum(p) can resolve in float32.
_LEAST_MASS = 2.0**-24


def sparse_kl_divergence(
    student: Float[Array, "*batch vocab"] | TopK,
    teacher: TopK,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    tail: Tail = "bucket",
    sample: TailSample | None = None,
    temperature: Number = 1.0,
    vocab_where: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*batch"]:
    """KL divergence to a teacher known by its top k logits and its log-normaliser.

    The teacher's probabilities of its top k tokens are exact, because the log-normaliser is that of
    the whole vocabulary. Everything else is one bucket, whose mass is exact as well: this is the
    KL divergence between the two distributions after merging the tail, hence a lower bound of the
    full one, and zero only where the student agrees on all k tokens.

    ::

        bucket        sum_{i<=k} p_i log(p_i / q_i) + p_rest log(p_rest / q_rest),
                      p_rest = 1 - sum_{i<=k} p_i,  q_rest = 1 - sum_{i<=k} q_i
        renormalize   T^2 KL of both softmaxes over the k tokens alone, logits / T
        sampled       sum_{i<=k} p_i log(p_i / q_i) + p_rest mean_s log(p_s / q_s)

    With `m` tokens drawn from the teacher's tail the last is an unbiased estimate of the whole
    divergence, and so is its gradient; a single position's value may be negative.

    Args:
      student: logits `[*batch, vocab]`, or the student's `TopK` at the *teacher's* indices (from
        `linear_readout`), followed by those of `sample`.
      teacher: `TopK` with k entries. Gets no gradient.
      direction: 'forward' for KL(teacher || student), 'reverse' for the other.
      tail: 'bucket'; 'renormalize', which ignores the tail; 'sampled', forward only.
      sample: what 'sampled' needs, `[*batch, m]`. Gets no gradient.
      temperature: with 'renormalize' only: the mass of the tail is known at temperature 1.
      vocab_where: boolean, broadcastable to the student's logits: True for the entries that exist.
      axis_name: mesh axis that splits the student's vocabulary, inside `jax.shard_map`.

    Returns:
      `[*batch]`, float32. Tail masses below 2^-24 count as 2^-24, the resolution of float32.

    Raises:
      ValueError: unknown `direction` or `tail`, shapes that do not fit, a temperature with
        'bucket' or 'sampled', or `sample` where it is not used or missing.

    >>> import jax.numpy as jnp
    >>> from logitjax.ops import top_k_of
    >>> teacher = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
    >>> student = jnp.log(jnp.array([0.25, 0.25, 0.25, 0.25]))
    >>> print(f"{sparse_kl_divergence(student, top_k_of(teacher, 2)):.4f}")
    0.1733

    References:
      MaxText and DistillKit keep top logits with the same log-normaliser; those that drop the
      tail correspond to 'renormalize'.
    """
    _check(direction, tail, temperature, sample)
    wanted = _ids(teacher, sample)
    if isinstance(student, TopK):
        gathered, log_z = student.values, student.log_z
    else:
        logits = mask_logits(as_float(student, "student"), vocab_where)
        log_z = logsumexp(logits, axis_name=axis_name)
        gathered = gather_at(logits, wanted, axis_name=axis_name)
    if gathered.shape != wanted.shape:
        raise ValueError(
            f"student must have the teacher's batch shape and entries, {wanted.shape}, "
            f"got {gathered.shape}"
        )
    if tail == "renormalize":
        gathered = gathered / temperature
    drawn = None if sample is None else jnp.asarray(sample.values)
    return _sparse_kl(gathered, log_z, teacher, drawn, direction, tail, temperature)


def linear_sparse_kl_divergence(
    hidden: Float[Array, "*batch hidden"],
    head: Float[Array, "rows columns"],
    teacher: TopK,
    *,
    labels: Int[Array, "*batch"] | None = None,
    cross_entropy_weight: float | int = 0.0,
    direction: Literal["forward", "reverse"] = "forward",
    tail: Tail = "bucket",
    sample: TailSample | None = None,
    temperature: Number = 1.0,
    bias: Float[Array, " vocab"] | None = None,
    vocab_axis: int | None = None,
    soft_cap: float | int | None = None,
    vocab_where: Bool[Array, " vocab"] | None = None,
    token_weights: Float[Array, "*batch"] | None = None,
    block_size: int | None = None,
    token_block: int | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "*losses"]:
    """`sparse_kl_divergence` of a linear head's logits, which never exist as a whole.

    Costs what `linear_cross_entropy` costs: the sweep over the vocabulary picks the student's
    logits at the teacher's ids as it passes them. The labels' cross-entropy can be added in the
    same sweep.

    ::

        sparse KL + cross_entropy_weight * cross-entropy(labels)

    Args:
      hidden: `[*batch, hidden]`, the student's.
      head: `[hidden, vocab]` or `[vocab, hidden]`.
      teacher: `TopK`, `[*batch, k]`. Gets no gradient.
      labels: `[*batch]`, needed with `cross_entropy_weight`.
      cross_entropy_weight: how much of the labels' cross-entropy to add.
      direction: as in `sparse_kl_divergence`.
      tail: as in `sparse_kl_divergence`.
      sample: likewise.
      temperature: with `tail='renormalize'` only.
      bias: `[vocab]`.
      vocab_axis: the head's vocabulary axis; needed only for a square head.
      soft_cap: of the student's logits.
      vocab_where: `[vocab]` boolean: True for the entries that exist.
      token_weights: `[*batch]`. Gives the scalar `sum(token_weights * loss)` and forms gradients in
        the same sweep as the value. A position of weight 0 counts for nothing.
      block_size: vocabulary entries a block; chosen from shape and backend by default.
      token_block: positions a block along the last batch axis; likewise.
      axis_name: mesh axis that splits the head's vocabulary, inside `jax.shard_map`.

    Returns:
      `[*batch]` float32, or a scalar with `token_weights`.

    Raises:
      ValueError: as `sparse_kl_divergence`, or labels are missing.

    >>> import jax.numpy as jnp
    >>> from logitjax.ops import top_k_of
    >>> one, head = jnp.ones((1,)), jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25]]))
    >>> teacher = top_k_of(jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125])), 2)
    >>> print(f"{linear_sparse_kl_divergence(one, head, teacher):.4f}")
    0.1733
    """
    _check(direction, tail, temperature, sample)
    tokens = {
        "ids": _ids(teacher, sample),
        "values": jnp.asarray(teacher.values),
        "log_z": jnp.asarray(teacher.log_z),
    }
    if sample is not None:
        tokens["drawn"] = jnp.asarray(sample.values)
    if cross_entropy_weight:
        if labels is None:
            raise ValueError("labels: needed with cross_entropy_weight")
        if temperature != 1:
            raise ValueError("temperature must be 1 with cross_entropy_weight")
        tokens["labels"] = jnp.asarray(labels)
    student = Branch(hidden, head, bias, vocab_axis, soft_cap)
    combine = _Combine(
        direction=direction,
        tail=tail,
        cross_entropy_weight=cross_entropy_weight,
        vocab=vocabulary_size(student, axis_name),
    )
    loss = sweep(
        functools.partial(_statistic, "labels" in tokens, tokens["ids"].shape[-1]),
        student,
        tokens=tokens | {"temperature": _per_token(temperature, tokens["log_z"])},
        temperature=temperature,
        vocab_where=vocab_where,
        combine=combine,
        token_weights=token_weights,
        block_size=block_size,
        token_block=token_block,
        axis_name=axis_name,
    )
    return loss if token_weights is None else loss[0]


def _per_token(value: Number, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Combine:
    direction: str
    tail: str
    cross_entropy_weight: float
    vocab: int

    def __call__(self, outputs: Readout, tokens: Any) -> jax.Array:
        ids = tokens["ids"][..., : tokens["values"].shape[-1]]
        teacher = TopK(values=tokens["values"], indices=ids, log_z=tokens["log_z"])
        loss = _sparse_kl(
            outputs.gathered,
            outputs.log_z,
            teacher,
            tokens.get("drawn"),
            self.direction,
            self.tail,
            tokens["temperature"],
        )
        if self.cross_entropy_weight:
            labels = tokens["labels"]
            known = (labels >= 0) & (labels < self.vocab)
            entropy = jnp.where(known, finite_or_zero(outputs.log_z) - outputs.label, jnp.nan)
            loss = loss + self.cross_entropy_weight * entropy
        return loss


def _statistic(labels: bool, ids: int, dtype: Any) -> ReadoutStatistic:
    return ReadoutStatistic(labels=labels, ids=ids, dtype=dtype)


def _ids(teacher: TopK, sample: TailSample | None) -> jax.Array:
    """Where the student's logits are needed: the top k, then what was drawn from the tail."""
    ids = jnp.asarray(teacher.indices)
    return ids if sample is None else jnp.concatenate([ids, jnp.asarray(sample.indices)], axis=-1)


def _check(direction: str, tail: str, temperature: Number, sample: TailSample | None) -> None:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    if tail not in get_args(Tail):
        raise ValueError(f"tail must be one of {', '.join(get_args(Tail))}, got {tail!r}")
    if (tail == "sampled") != (sample is not None):
        raise ValueError(f"sample: tail='sampled' needs one and nothing else does, got {tail=}")
    if tail == "sampled" and direction == "reverse":
        raise ValueError("direction must be 'forward' with tail='sampled': the teacher drew it")
    check_positive(temperature, "temperature")
    if tail != "renormalize" and not (isinstance(temperature, int | float) and temperature == 1):
        raise ValueError(
            f"temperature must be 1 with tail={tail!r}: the mass outside the top k is known at "
            f"temperature 1 only; got {temperature}"
        )


def _sparse_kl(
    gathered: jax.Array,
    log_z: jax.Array,
    teacher: TopK,
    drawn: jax.Array | None,
    direction: str,
    tail: str,
    temperature: Any,
) -> jax.Array:
    """``gathered``: the student's logits, already over the temperature, at the teacher's ids, then
    at those of the logits ``drawn``."""
    values = jax.lax.stop_gradient(jnp.asarray(teacher.values).astype(gathered.dtype))
    if tail == "renormalize":
        scale = jnp.asarray(temperature, gathered.dtype)
        values = values / (scale[..., None] if scale.ndim else scale)
        log_p = values - finite_or_zero(logsumexp(values))[..., None]
        log_q = gathered - finite_or_zero(logsumexp(gathered))[..., None]
        return jnp.square(scale) * _kl(log_p, log_q, direction)
    teacher_log_z = jax.lax.stop_gradient(jnp.asarray(teacher.log_z).astype(gathered.dtype))
    log_p = values - finite_or_zero(teacher_log_z)[..., None]
    log_q = gathered - finite_or_zero(log_z)[..., None]
    if drawn is not None:
        k = log_p.shape[-1]
        log_drawn = jax.lax.stop_gradient(drawn) - finite_or_zero(teacher_log_z)[..., None]
        rest = jnp.maximum(1.0 - jnp.exp(log_p).sum(-1), 0.0)
        there = log_drawn > -jnp.inf
        gap = jnp.where(there, log_drawn - log_q[..., k:], 0.0).mean(-1)
        return _kl(log_p, log_q[..., :k], direction) + rest * gap
    log_p, log_q = _with_tail(log_p), _with_tail(log_q)
    return _kl(log_p, log_q, direction)


def _with_tail(log_probs: jax.Array) -> jax.Array:
    rest = jnp.log(jnp.maximum(1.0 - jnp.exp(log_probs).sum(-1, keepdims=True), _LEAST_MASS))
    return jnp.concatenate([log_probs, rest], -1)


def _kl(log_p: jax.Array, log_q: jax.Array, direction: str) -> jax.Array:
    over, under = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    both = (over > -jnp.inf) & (under > -jnp.inf)
    gap = jnp.where(both, over, 0.0) - jnp.where(both, under, 0.0)
    mass = jnp.exp(over)
    return jnp.where(both, mass * gap, jnp.where(mass > 0, jnp.inf, 0.0)).sum(-1)
