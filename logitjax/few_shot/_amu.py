"""AMU: a linear predictor on another encoder's features, weighted by zero-shot uncertainty."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.few_shot._method import (
    FewShotTask,
    Inputs,
    Method,
    State,
    class_means,
    needed,
    z_score,
)
from logitjax.losses import cross_entropy
from logitjax.ops import Array, Number, checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uncertainty:
    """The factor of the bias: large if the zero-shot classifier is uncertain, by kurtosis.

    `(mean(z(x)^4) / normalizer) ^ -rho`, with z as `z_score` and x the probabilities or the logits.

    The kurtosis of probabilities grows with the number of classes K (one-hot: about K), so with a
    fixed normaliser beta has another meaning on every data set; `'classes'`, K / 4, avoids this
    and is 250 at K = 1000. The kurtosis of logits is 2 to 3 for any K and hardly depends on the
    classifier's confidence. A class at `-inf` does not count in K. Source: Tang et al.,
    AMU-Tuning (arXiv 2404.08958); constants from `clip/amu.py` of its repository.

    Attributes:
        of: `'probabilities'`, as in the released code, or `'logits'`, as in the paper.
        exponent: rho.
        normalizer: Divisor of the kurtosis: a number (released code: 250), `'classes'`, or None: 1.
    """

    of: Literal["probabilities", "logits"] = "probabilities"
    exponent: Number = 0.4
    normalizer: Number | Literal["classes"] | None = None

    def __post_init__(self) -> None:
        if self.of not in ("probabilities", "logits"):
            raise ValueError(f"of: expected 'probabilities' or 'logits', got {self.of!r}")
        if isinstance(self.normalizer, str) and self.normalizer != "classes":
            raise ValueError(
                f"normalizer: expected a number, 'classes' or None, got {self.normalizer!r}"
            )

    def weight(self, zero_shot: Float[Array, "*batch classes"]) -> Float[jax.Array, "*batch 1"]:
        """The factor of the bias, for each image; it has no parameters and can be computed once."""
        logits = checks.as_float(zero_shot, "zero_shot")
        # Classes absent from a task are at -inf.
        present = logits != -jnp.inf
        count = present.sum(-1, keepdims=True)
        x = jax.nn.softmax(logits) if self.of == "probabilities" else logits
        fourth = z_score(jnp.where(present, x, -jnp.inf)) ** 4
        # 3 for a normal distribution; 0 for flat logits alone, of others at least 1/4.
        level = jnp.maximum(fourth.sum(-1, keepdims=True) / jnp.maximum(count, 1), 0.25)
        if self.normalizer is not None:
            level = level / (count / 4 if isinstance(self.normalizer, str) else self.normalizer)
        return level**-self.exponent


@dataclasses.dataclass(frozen=True, kw_only=True)
class AMU(Method):
    """AMU-Tuning as in the released code; :meth:`paper` follows the paper's figure.

    Without the z-score the bias keeps the scale of features of length one, and weight decay and
    learning rate determine its influence. The released code takes the best epoch on the test set;
    this class does not. Source: Tang et al., AMU-Tuning (arXiv 2404.08958), multi-branch training.

    Attributes:
        fusion_share: lambda, the share of the fused logits' loss.
        uncertainty: Factor of the bias for each image; None for no factor.
        standardize: z-score of the bias.
        initial: Initial predictor: `'features'` (class means) or `'random'`.
    """

    beta: Number = 0.5
    fusion_share: Number = 0.35
    uncertainty: Uncertainty | None = None
    standardize: bool = True
    initial: Literal["features", "random"] = "features"
    needs: ClassVar[tuple[str, ...]] = ("auxiliary",)

    def __post_init__(self) -> None:
        if self.initial not in ("features", "random"):
            raise ValueError(f"initial: expected 'features' or 'random', got {self.initial!r}")

    @classmethod
    def paper(cls, **options: Any) -> "AMU":
        """The paper's figure: plain logits, fused by the kurtosis of the zero-shot logits."""
        return cls(**{"standardize": False, "uncertainty": Uncertainty(of="logits"), **options})

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        features = task.mean_view("auxiliary", self)
        # [classes, features]: both products of a step are faster than with the axes swapped.
        shape = (task.num_classes, features.shape[-1])
        if self.initial == "features":
            kernel = class_means(features, task.labels, shape[0]).T
        else:
            key = jax.random.key(0) if key is None else key
            # Initialised like torch's Linear.
            limit = shape[1] ** -0.5
            kernel = jax.random.uniform(key, shape, features.dtype, -limit, limit)
        return State(kernel, None)

    def auxiliary_logits(self, state: State, inputs: Inputs) -> jax.Array:
        """The bias alone, before its weights: a classifier independent of the zero-shot one."""
        logits = needed(inputs.auxiliary, "auxiliary", self) @ state.trained.T
        return z_score(logits) if self.standardize else logits

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        return self._weighted(self.auxiliary_logits(state, inputs), inputs)

    def _weighted(self, bias: jax.Array, inputs: Inputs) -> jax.Array:
        if self.uncertainty is None:
            return bias
        return self.uncertainty.weight(inputs.zero_shot) * bias

    def loss(self, state: State, inputs: Inputs, labels: Any) -> jax.Array:
        """Loss of the fused logits, and of the bias alone so that it is useful on its own.

        `(1 - lambda) * CE(bias, y) + lambda * CE(s0 + beta * weight * bias, y)`
        """
        bias = self.auxiliary_logits(state, inputs)
        zero_shot = checks.as_float(inputs.zero_shot, "zero_shot")
        fused = zero_shot + self.beta * self._weighted(bias, inputs)
        alone, both = cross_entropy(bias, labels), cross_entropy(fused, labels)
        share: Any = self.fusion_share
        return (1.0 - share) * alone + share * both
