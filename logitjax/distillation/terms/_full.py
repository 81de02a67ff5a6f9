import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from logitjax.distillation._term import StudentNeeds, TeacherNeeds, Term
from logitjax.losses import sweep
from logitjax.ops import checks
from logitjax.ops import mesh as on_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Full(Term):
    temperature: float = 1.0
    rows: Literal["all", "text", "own"] = "all"
    teacher = TeacherNeeds(hidden=True, same_vocabulary=True)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        if self.rows not in ("all", "text", "own"):
            raise ValueError(f"rows: expected 'all', 'text' or 'own', got {self.rows!r}")

    @property
    def batch(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.rows == "all" else ("log_probs",)

    def seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        return None if self.rows == "all" else jnp.isnan(batch["log_probs"]) != (self.rows == "own")

    @property
    def statistic(self) -> sweep.Statistic:
        raise NotImplementedError

    def student(self, teacher: Any) -> StudentNeeds:
        statistic = self.statistic
        if self.temperature != 1.0:
            statistic = sweep.Tempered(statistic, self.temperature)
        return StudentNeeds(statistic=statistic)

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        # Gradients shrink by 1 / T^2.
        return self.temperature**2 * read.statistic


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullKL(_Full):
    """KL over the whole vocabulary, from a live teacher's hidden states and head.

    ::

        forward KL(teacher || student) + (1 - forward) KL(student || teacher)

    Attributes:
        forward: Share of KL(teacher || student): 1 for the forward KL alone, 0 for the reverse.
        entropy_above: The forward part counts only where the teacher's entropy, in nats, is above
            this value, because the reverse KL would lose modes there. Twice this term with
            `forward=0.5` is EOPD (arXiv 2603.07079).
        entropy_quantile: The same, for entropies above this quantile over a row's labels.
        temperature: Divides the logits of both; its square multiplies the value.
        rows: Rows that count: `'all'`, `'text'`, or the student's `'own'`.
    """

    forward: float = 1.0
    entropy_above: float = 0.0
    entropy_quantile: float = 0.0
    name = "full_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.between(self.forward, 0, 1, "forward")
        checks.between(self.entropy_quantile, 0, 1, "entropy_quantile")

    @property
    def pointwise(self) -> bool:  # type: ignore[override]
        # A quantile requires the whole row.
        return self.entropy_quantile == 0

    _is_gated = property(lambda self: max(self.entropy_above, self.entropy_quantile) > 0)

    @property
    def statistic(self) -> sweep.Statistic:
        parts = (
            (sweep.KLStatistic(), self.forward > 0),
            (sweep.KLStatistic(reverse=True), self.forward < 1),
            (sweep.TeacherStatistic(), self.forward > 0 and self._is_gated),
        )
        return sweep.Several(tuple(statistic for statistic, is_read in parts if is_read))

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        value = 0.0
        if self.forward < 1:
            # The second statistic if there is a forward part, otherwise the first.
            value = (1 - self.forward) * read.statistic[self.forward > 0]
        if self.forward > 0:
            part = self.forward * read.statistic[0]
            if self._is_gated:
                entropy = read.statistic[-1].entropy
                gate = entropy > self.entropy_above
                if self.entropy_quantile > 0:
                    gate &= entropy > _row_quantile(entropy, batch["where"], self.entropy_quantile)
                part = jnp.where(gate, part, 0.0)
            value = value + part
        return self.temperature**2 * value


def _row_quantile(values: jax.Array, where: jax.Array, share: float) -> jax.Array:
    """Quantile `[*rows, 1]` of the values along the last axis that count."""
    counted = jnp.where(where, values, jnp.nan)
    return on_mesh.over_batch(
        lambda x: (jnp.nanquantile(x, share, axis=-1, keepdims=True),), (values.ndim,), counted
    )[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedKL(FullKL):
    """Forward and reverse KL over the whole vocabulary, for a student's own samples.

    Attributes:
        forward: Share of KL(teacher || student); options are those of `FullKL`. Reverse KL alone
            sharpens the student; on long samples a substantial share of forward KL preserves its
            entropy.
    """

    forward: float = 0.5
    name = "mixed_kl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullJSD(_Full):
    """Generalised Jensen-Shannon divergence over the whole vocabulary, from a live teacher.

    Attributes:
        beta: Share of the teacher in the mixture; 0 for KL(teacher || student), 1 for the reverse,
            as in TRL.
        normalize: Divide by `beta (1 - beta)`, so that both ends are limits of the value; as
            defined it falls to 0 towards either.
        temperature: Divides the logits of both; its square multiplies the value.
        rows: Where it counts, see `FullKL`.
    """

    beta: float = 0.5
    normalize: bool = False
    name = "full_jsd"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.between(self.beta, 0, 1, "beta")

    @property
    def statistic(self) -> sweep.Statistic:
        beta = self.beta
        if beta in (0, 1):
            # Here the mixture is one of the two distributions, and its formula would be 0 times
            # infinity.
            return sweep.KLStatistic(reverse=beta == 1)
        # beta (1 - beta) divides both weights (beta, 1 - beta).
        weights = (1 / (1 - beta), 1 / beta) if self.normalize else (beta, 1 - beta)
        return sweep.MixtureStatistic(beta=beta, weights=weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkewKL(_Full):
    """Skew KL divergence over the whole vocabulary (DistiLLM), from a live teacher.

    ::

        forward   KL(teacher || alpha teacher + (1 - alpha) student)
        reverse   KL(student || alpha student + (1 - alpha) teacher)

    Attributes:
        alpha: Share of the first distribution in the mixture, which bounds the value.
        direction: `'forward'` for text written by the teacher, `'reverse'` for the student's own.
        fixed_mixture: Whether the gradient of the reverse KL treats the mixture as a constant, as
            DistiLLM-2 (arXiv 2503.07067) does on the student's own rows.
        temperature: Divides the logits of both; its square multiplies the value.
        rows: Where it counts, see `FullKL`.
    """

    alpha: float = 0.1
    direction: Literal["forward", "reverse"] = "forward"
    fixed_mixture: bool = False
    name = "skew_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha: expected a number between 0 and 1, got {self.alpha}")
        if self.direction not in ("forward", "reverse"):
            raise ValueError(f"direction: expected 'forward' or 'reverse', got {self.direction!r}")
        if self.fixed_mixture and self.direction == "forward":
            # The student appears in the mixture only, so its gradient would be zero.
            raise ValueError("fixed_mixture: expected False for the forward direction, got True")

    @property
    def statistic(self) -> sweep.Statistic:
        if self.direction == "forward":
            # The mixture has alpha of the teacher; only one of its two parts has a weight.
            return sweep.MixtureStatistic(beta=self.alpha, weights=(1.0, 0.0))
        options: Any = {"weights": (0.0, 1.0), "fixed": self.fixed_mixture}
        return sweep.MixtureStatistic(beta=1 - self.alpha, **options)
