import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term
from logitjax.distillation.tokenizers._likelihood_matching import (
    LikelihoodStatistic,
    chunk_likelihood,
)
from logitjax.losses import sweep
from logitjax.ops import checks, gather_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sampled(Term):
    clip: tuple[float, float] = (0.5, 2.0)
    batch = ("log_probs",)

    def __post_init__(self) -> None:
        if len(self.clip) != 2 or not 0 <= self.clip[0] <= 1 <= self.clip[1]:
            raise ValueError(f"clip: expected bounds below and above 1, got {self.clip}")

    def seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        return ~jnp.isnan(batch["log_probs"])

    def ratio(self, log_q: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
        """Clipped ratio of a label's current probability to that when sampled; no gradient."""
        sampled = batch["log_probs"]
        # Labels that were not sampled have NaN there, and a ratio of 1.
        ratio = jnp.exp(log_q - jnp.where(jnp.isnan(sampled), log_q, sampled))
        return lax.stop_gradient(jnp.clip(ratio, *self.clip))


def _policy(value: jax.Array, advantage: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return `value` with the gradient of `-advantage log_q`; none if either lacks the token."""
    moved = jnp.where(jnp.isfinite(log_q), log_q - lax.stop_gradient(log_q), 0.0)
    advantage = jnp.where(jnp.isfinite(advantage), advantage, 0.0)
    return lax.stop_gradient(value) - lax.stop_gradient(advantage) * moved


def _to_come(values: jax.Array, sampled: jax.Array, discount: float) -> jax.Array:
    """Discounted sum of the values after each position, up to the end of its run of samples."""
    # Affine maps of the sum so far can be composed, which makes the scan parallel.
    composed = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])  # noqa: E731
    maps = (jnp.where(sampled, discount, 0.0), values)
    total = lax.associative_scan(composed, maps, reverse=True, axis=values.ndim - 1)[1]
    return discount * jnp.pad(total, ((0, 0),) * (values.ndim - 1) + ((0, 1),))[..., 1:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledKL(_Sampled):
    """KL(student || teacher) at tokens that the student has sampled, from a live teacher.

    With `d = log q - log p` of the label, `q` the student's, and `w` the clipped ratio of `q` to
    the label's probability when sampled::

        policy   gradient w (d - KL) of log q, KL exact; the value is that KL
        k2       w d^2 / 2, the same gradient in expectation without the baseline
        k1       w d             reported only: its gradient is 0 in expectation
        k3       w (1/r + log r - 1), r = q / p, reported only: its gradient is the forward KL's

    Attributes:
        kind: See above.
        discount: Weight of the next token's KL in a token's reward, squared for the one after it,
            and so on. With 1 the gradient is that of the KL of whole samples (MiniLLM).
        clip: Bounds of the ratio `w`, which is 1 for fresh samples.

    References:
        arXiv 2605.07865 for the exact baseline; MiniLLM (arXiv 2306.08543) for rewards to go.
    """

    kind: Literal["policy", "k1", "k2", "k3"] = "policy"
    discount: float = 0.0
    name = "sampled_kl"
    teacher = TeacherNeeds(hidden=True, same_vocabulary=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("policy", "k1", "k2", "k3"):
            raise ValueError(f"kind: expected policy, k1, k2 or k3, got {self.kind!r}")
        checks.between(self.discount, 0, 1 if self.kind == "policy" else 0, "discount")

    @property
    def pointwise(self) -> bool:  # type: ignore[override]
        return self.discount == 0

    @property
    def trains(self) -> bool:  # type: ignore[override]
        return self.kind in ("policy", "k2")

    def student(self, teacher: Any) -> StudentNeeds:
        exact = (sweep.KLStatistic(reverse=True),) if self.kind == "policy" else ()
        statistic = sweep.Several((sweep.TeacherStatistic(), *exact))
        return StudentNeeds(label=True, statistic=statistic)

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        log_q = -read.cross_entropy
        weight, apart = self.ratio(log_q, batch), log_q - read.statistic[0].label
        if self.kind == "policy":
            kl = read.statistic[1]
            # The KL is infinite if the teacher lacks a token of the student.
            baseline = jnp.where(jnp.isfinite(kl), kl, 0.0)
            cost = apart - baseline
            if self.discount:
                sampled = batch["where"] & self.seen(teacher, batch)
                cost += _to_come(jnp.where(sampled, baseline, 0.0), sampled, self.discount)
            return _policy(kl, -weight * cost, log_q)
        # exp(-d) - 1 loses all digits near d = 0, which is where a good student is.
        kinds = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: jnp.expm1(-d) + d}
        return weight * kinds[self.kind](apart)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkReward(_Sampled):
    """Policy gradient with each chunk's log-likelihood as reward: teacher's minus student's.

    The teacher may have any tokenizer: it reads the student's text in its own tokens. Each token of
    a chunk gets the reward of the whole chunk. The value is minus the mean reward.

    Attributes:
        clip: Bounds of the ratio to the sampling distribution, which is 1 for fresh samples.
    """

    name = "chunk_reward"
    teacher = TeacherNeeds(chunks=True)
    pointwise = False

    def student(self, teacher: Any) -> StudentNeeds:
        return StudentNeeds(statistic=LikelihoodStatistic(teacher.vocabularies.boundary))

    def seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        # A label outside all chunks is not aligned with the teacher's text, so it has no reward.
        return super().seen(teacher, batch) & (teacher.chunks.ids >= 0)

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        log_q, chunks = read.statistic.label, teacher.chunks
        reward = chunks.scores - chunk_likelihood(read.statistic, chunks)
        reward = gather_at(reward, jnp.maximum(chunks.ids, 0))
        return _policy(-reward, self.ratio(log_q, batch) * reward, log_q)
