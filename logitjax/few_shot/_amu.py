"""AMU: a linear predictor on another encoder's features, fused by the zero-shot logits' doubt."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.few_shot._method import (
    FewShotTask,
    Inputs,
    Method,
    State,
    class_means,
    needed,
    z_score,
)
from logitjax.few_shot._uncertainty import OFFICIAL_NORMALIZER, Uncertainty, uncertainty_weight
from logitjax.losses import cross_entropy
from logitjax.ops import Array, Number, checks

_CERTAIN = Uncertainty()


def auxiliary_logits(
    auxiliary: Float[Array, "*batch features"],
    kernel: Float[Array, "features classes"],
    *,
    standardize: bool = True,
) -> Float[jax.Array, "*batch classes"]:
    """The bias of AMU: linear logits of the auxiliary features, standardised in each example.

    ::

        z(x @ W)

    >>> auxiliary_logits(jnp.eye(2), jnp.eye(2), standardize=False)
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    logits = checks.as_float(auxiliary, "auxiliary") @ checks.as_float(kernel, "kernel")
    return z_score(logits) if standardize else logits


def fuse_logits(
    zero_shot: Float[Array, "*batch classes"],
    bias: Float[Array, "*batch classes"],
    *,
    beta: Number = 1.0,
    weight: Float[Array, "*batch 1"] | None = None,
) -> Float[jax.Array, "*batch classes"]:
    """`s0 + beta * weight * s_bias`.

    >>> fuse_logits(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]]), beta=0.5)
    Array([[1., 1.]], dtype=float32)
    """
    bias = checks.as_float(bias, "bias")
    return checks.as_float(zero_shot, "zero_shot") + beta * (
        bias if weight is None else weight * bias
    )


def multi_branch_loss(
    auxiliary: Float[Array, "*batch classes"],
    fused: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    fusion_share: Number = 0.35,
) -> Float[jax.Array, "*batch"]:
    """Cross-entropy of the fused logits, and of the bias alone so that it can stand by itself.

    ::

        (1 - lambda) * CE(auxiliary, y) + lambda * CE(fused, y)

    >>> even = jnp.zeros((1, 2))
    >>> print(f"{jax.jit(multi_branch_loss)(even, even, jnp.array([0]))[0]:.4f}")
    0.6931

    References:
        Tang et al., AMU-Tuning (arXiv 2404.08958), multi-branch training.
    """
    own = cross_entropy(auxiliary, labels)
    both = cross_entropy(fused, labels)
    return jnp.multiply(1.0 - fusion_share, own) + jnp.multiply(fusion_share, both)


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
        initial: The predictor starts from `'features'` (class means), `'random'` or `'zeros'`.
    """

    beta: Number = 0.5
    fusion_share: Number = 0.35
    uncertainty: Uncertainty = _CERTAIN
    standardize: bool = True
    initial: Literal["features", "random", "zeros"] = "features"

    def __post_init__(self) -> None:
        if self.initial not in ("features", "random", "zeros"):
            raise ValueError(
                f"initial: expected 'features', 'random' or 'zeros', got {self.initial!r}"
            )

    @classmethod
    def paper(cls, **options: Any) -> "AMU":
        """As in the paper's figure: plain logits, fused by the kurtosis of the zero-shot logits."""
        uncertainty = Uncertainty(measure="kurtosis", of="logits", normalizer=None)
        own: dict[str, Any] = {"standardize": False, "uncertainty": uncertainty}
        return cls(**(own | options))

    @classmethod
    def official(cls, *, uncertainty: str = "none", **options: Any) -> "AMU":
        """As in the released code; `uncertainty='moment'` is its kurtosis, left off there."""
        if uncertainty not in ("none", "moment"):
            raise ValueError(f"uncertainty: expected 'none' or 'moment', got {uncertainty!r}")
        chosen = Uncertainty()
        if uncertainty == "moment":
            chosen = Uncertainty(measure="kurtosis", normalizer=OFFICIAL_NORMALIZER)
        own: dict[str, Any] = {"uncertainty": chosen}
        return cls(**(own | options))

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        features = task.mean_view("auxiliary", self)
        shape = (features.shape[-1], task.num_classes)
        if self.initial == "features":
            kernel = class_means(features, task.labels, shape[1])
        elif self.initial == "zeros":
            kernel = jnp.zeros(shape, features.dtype)
        else:
            key = jax.random.key(0) if key is None else key
            limit = shape[0] ** -0.5
            kernel = jax.random.uniform(key, shape, features.dtype, -limit, limit)
        return State(kernel, None)

    def prepare(self, inputs: Inputs) -> Inputs:
        if self.uncertainty.measure == "none":
            return inputs
        weight = uncertainty_weight(inputs.zero_shot, self.uncertainty)
        return dataclasses.replace(inputs, weight=weight)

    def auxiliary_logits(self, state: State, inputs: Inputs) -> jax.Array:
        """The bias alone, before its weights: a classifier that never saw the zero-shot one."""
        auxiliary = needed(inputs.auxiliary, "auxiliary", self)
        return auxiliary_logits(auxiliary, state.trained, standardize=self.standardize)

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        bias = self.auxiliary_logits(state, inputs)
        inputs = self.prepare(inputs) if inputs.weight is None else inputs
        return bias if inputs.weight is None else inputs.weight * bias

    def loss(self, state: State, inputs: Inputs, labels: Any) -> jax.Array:
        inputs = self.prepare(inputs) if inputs.weight is None else inputs
        bias = self.auxiliary_logits(state, inputs)
        fused = fuse_logits(inputs.zero_shot, bias, beta=self.beta, weight=inputs.weight)
        return multi_branch_loss(bias, fused, labels, fusion_share=self.fusion_share)
