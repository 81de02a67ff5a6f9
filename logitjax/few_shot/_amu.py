"""AMU: a linear predictor on another encoder's features, fused by the zero-shot logits' doubt."""

import dataclasses
from typing import Any, ClassVar, Literal, get_args

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

Measure = Literal["none", "kurtosis", "entropy", "max", "margin", "energy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uncertainty:
    """The factor of the bias: large where the zero-shot classifier is unsure.

    ======== ==============================================================
    measure  factor, with x the probabilities or the logits
    ======== ==============================================================
    none     1
    kurtosis `(mean(z(x)^4) / normalizer) ^ -rho`
    entropy  `exp(rho * H(p) / log K)`
    max      `max(x) ^ -rho`
    margin   `(max(x) - min(x)) ^ -rho`
    energy   `(2 log sum exp((x - max(x)) / 2) + 2 max(x)) ^ -rho`
    ======== ==============================================================

    z is `z_score`. The kurtosis of probabilities grows with the number of classes K (one-hot:
    about K), so a fixed normaliser makes beta mean something else on every data set;
    `'classes'`, K / 4, is 250 at K = 1000 and does not. The kurtosis of logits is 2 to 3 for any
    K and hardly depends on how sure the classifier is. A class at `-inf` is not there and not
    counted in K; of logits, `max` and `energy` want positive ones.

    Attributes:
        measure: A row of the table.
        of: `'probabilities'`, as in the released code, or `'logits'`, as in the paper; the
            entropy is always of probabilities.
        exponent: rho.
        normalizer: What the kurtosis is divided by: a number (released code: 250), `'classes'` or
            None for 1.

    References:
        Tang et al., AMU-Tuning (arXiv 2404.08958); measures and constants from `clip/amu.py` of its
        repository (its energy adds the maximum after the division by the temperature 2 and before
        the product with it, which is kept).
    """

    measure: Measure = "none"
    of: Literal["probabilities", "logits"] = "probabilities"
    exponent: Number = 0.4
    normalizer: Number | Literal["classes"] | None = None

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise ValueError(
                f"measure: expected one of {', '.join(get_args(Measure))}, got {self.measure!r}"
            )
        if self.of not in ("probabilities", "logits"):
            raise ValueError(f"of: expected 'probabilities' or 'logits', got {self.of!r}")
        if isinstance(self.normalizer, str) and self.normalizer != "classes":
            raise ValueError(
                f"normalizer: expected a number, 'classes' or None, got {self.normalizer!r}"
            )

    def weight(self, zero_shot: Float[Array, "*batch classes"]) -> Float[jax.Array, "*batch 1"]:
        """The factor of the bias, for each image; it has no parameters and can be computed once."""
        logits = checks.as_float(zero_shot, "zero_shot")
        measure, rho = self.measure, self.exponent
        if measure == "none":
            return jnp.ones((*logits.shape[:-1], 1), logits.dtype)
        there = logits != -jnp.inf
        count = there.sum(-1, keepdims=True)
        if measure == "entropy":
            log_p = jax.nn.log_softmax(logits)
            # A class without mass has no part in the entropy.
            terms = jnp.where(there, jnp.exp(log_p) * jnp.where(there, log_p, 0.0), 0.0)
            most = jnp.log(jnp.maximum(count, 2))  # of one class it would be 0
            return jnp.exp(-rho * terms.sum(-1, keepdims=True) / most)
        x = jax.nn.softmax(logits) if self.of == "probabilities" else logits
        if measure == "kurtosis":
            fourth = z_score(jnp.where(there, x, -jnp.inf)) ** 4
            level = fourth.sum(-1, keepdims=True) / jnp.maximum(count, 1)
            if self.normalizer is not None:
                by = count / 4 if isinstance(self.normalizer, str) else self.normalizer
                level = level / by
            return level**-rho
        top = x.max(-1, keepdims=True)
        if measure == "max":
            level = top
        elif measure == "margin":
            level = top - x.min(-1, keepdims=True, where=there, initial=jnp.inf)
        else:
            parts = jnp.where(there, jnp.exp((x - top) / 2.0), 0.0)
            level = 2.0 * (jnp.log(parts.sum(-1, keepdims=True)) + top)
        return level**-rho


_CERTAIN = Uncertainty()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AMU(Method):
    """AMU-Tuning; :meth:`paper` and :meth:`official` are the two that were published.

    ============= ============================ ========================================
    \\             paper                        released code
    ============= ============================ ========================================
    bias          `x W`                      `z(x W)`
    uncertainty   kurtosis of the logits       none in the published commands; the option
                                               `moment`: kurtosis of probabilities / 250
    exponent rho  not known, .4 here           .4
    beta, lambda  not known, .5 and .35 here   .5 and .35 (ViT-B/16), .65 and .45 (MindSpore, RN50)
    ============= ============================ ========================================

    Without the z-score the bias keeps the scale of features of length one, and weight decay and
    learning rate decide how much it says. The released code takes the best epoch on the test set;
    nothing here does.

    Attributes:
        beta: Factor of the bias.
        fusion_share: lambda, the share of the fused logits' loss.
        uncertainty: Factor of the bias in each image.
        standardize: z-score of the bias.
        initial: The predictor starts from `'features'` (class means), or `'random'`.

    References:
        Tang et al., AMU-Tuning (arXiv 2404.08958), multi-branch training; its released code.
    """

    beta: Number = 0.5
    fusion_share: Number = 0.35
    uncertainty: Uncertainty = _CERTAIN
    standardize: bool = True
    initial: Literal["features", "random"] = "features"
    needs: ClassVar[tuple[str, ...]] = ("auxiliary",)

    def __post_init__(self) -> None:
        if self.initial not in ("features", "random"):
            raise ValueError(f"initial: expected 'features' or 'random', got {self.initial!r}")

    @classmethod
    def paper(cls, **options: Any) -> "AMU":
        """As in the paper's figure: plain logits, fused by the kurtosis of the zero-shot logits."""
        uncertainty = Uncertainty(measure="kurtosis", of="logits", normalizer=None)
        return cls(**{"standardize": False, "uncertainty": uncertainty, **options})

    @classmethod
    def official(cls, *, uncertainty: str = "none", **options: Any) -> "AMU":
        """As in the released code; `uncertainty='moment'` is its kurtosis, left off there."""
        if uncertainty not in ("none", "moment"):
            raise ValueError(f"uncertainty: expected 'none' or 'moment', got {uncertainty!r}")
        chosen = Uncertainty()
        if uncertainty == "moment":
            # The released code divides the kurtosis of 1000 probabilities by this.
            chosen = Uncertainty(measure="kurtosis", normalizer=250.0)
        return cls(**{"uncertainty": chosen, **options})

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        features = task.mean_view("auxiliary", self)
        shape = (features.shape[-1], task.num_classes)
        if self.initial == "features":
            kernel = class_means(features, task.labels, shape[1])
        else:
            key = jax.random.key(0) if key is None else key
            limit = shape[0] ** -0.5  # as torch's Linear begins
            kernel = jax.random.uniform(key, shape, features.dtype, -limit, limit)
        return State(kernel, None)

    def prepare(self, inputs: Inputs) -> Inputs:
        if self.uncertainty.measure == "none":
            return inputs
        return dataclasses.replace(inputs, weight=self.uncertainty.weight(inputs.zero_shot))

    def auxiliary_logits(self, state: State, inputs: Inputs) -> jax.Array:
        """The bias alone, before its weights: a classifier that never saw the zero-shot one."""
        logits = needed(inputs.auxiliary, "auxiliary", self) @ state.trained
        return z_score(logits) if self.standardize else logits

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        bias = self.auxiliary_logits(state, inputs)
        inputs = self.prepare(inputs) if inputs.weight is None else inputs
        return bias if inputs.weight is None else inputs.weight * bias

    def loss(self, state: State, inputs: Inputs, labels: Any) -> jax.Array:
        """Of the fused logits, and of the bias alone so that it can stand by itself.

        ::

            (1 - lambda) * CE(bias, y) + lambda * CE(s0 + beta * weight * bias, y)
        """
        inputs = self.prepare(inputs) if inputs.weight is None else inputs
        bias = self.auxiliary_logits(state, inputs)
        weighted = bias if inputs.weight is None else inputs.weight * bias
        fused = checks.as_float(inputs.zero_shot, "zero_shot") + self.beta * weighted
        alone, both = cross_entropy(bias, labels), cross_entropy(fused, labels)
        share: Any = self.fusion_share
        return (1.0 - share) * alone + share * both
