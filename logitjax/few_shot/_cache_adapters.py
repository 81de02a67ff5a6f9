"""Few-shot methods that look images up among the labelled ones: Tip-Adapter, CaFo, APE."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.few_shot._method import (
    FewShotTask,
    Inputs,
    Method,
    State,
    needed,
    one_hot,
    unit_rows,
    z_score,
)
from logitjax.ops import Array, Number, checks


def cache_logits(
    features: Float[Array, "*batch features"],
    keys: Float[Array, "n features"],
    values: Float[Array, "n classes"],
    *,
    sharpness: Number = 1.0,
) -> Float[jax.Array, "*batch classes"]:
    """Labels of the cached images, weighted by how near each one is.

    ::

        exp(-b (1 - f @ F.T)) @ L

    Args:
        features: `[*batch, features]`, rows of length one.
        keys: `F`, `[n, features]` of the labelled images.
        values: `L`, `[n, classes]`: one-hot labels, perhaps weighted.
        sharpness: b.

    Returns:
        float32 `[*batch, classes]`.

    >>> cache_logits(jnp.eye(2), jnp.eye(2), jnp.eye(2), sharpness=0.0)
    Array([[1., 1.],
           [1., 1.]], dtype=float32)

    References:
        Zhang et al., Tip-Adapter (arXiv 2207.09519), eq. 4.
    """
    affinity = checks.as_float(features, "features") @ checks.as_float(keys, "keys").T
    return jnp.exp(-sharpness * (1.0 - affinity)) @ checks.as_float(values, "values")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TipAdapter(Method):
    """Tip-Adapter: a cache of the labelled images, without training.

    The released code searches sharpness and beta on the evaluation set; search them on other data.

    Attributes:
        beta: The paper's alpha; 1.17 on ImageNet.
        sharpness: The paper's beta.
    """

    beta: Number = 1.17
    sharpness: Number = 1.0
    trains: ClassVar[bool] = False

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        del key
        keys = task.mean_view("features", self)
        return State(keys, one_hot(task.labels, task.num_classes, keys.dtype))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features = needed(inputs.features, "features", self)
        return cache_logits(features, state.trained, state.fixed, sharpness=self.sharpness)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TipAdapterF(TipAdapter):
    """Tip-Adapter-F: the keys of the cache are trained, from the labelled images on."""

    trains: ClassVar[bool] = True


def cafo_bias(
    zero_shot: Float[Array, "*batch classes"],
    candidates: Float[Array, "models *batch classes"],
) -> Float[jax.Array, "*batch classes"]:
    """CaFo's fusion: standardised logits of several models, weighted by agreement with zero-shot.

    ::

        sum_m p_m z(c_m),    p = softmax_m(<z(s0), z(c_m)>)

    Args:
        zero_shot: `s0`, `[*batch, classes]`.
        candidates: `[models, *batch, classes]`.

    Returns:
        float32 `[*batch, classes]`.

    >>> import numpy as np
    >>> bias = jax.jit(cafo_bias)(np.eye(2)[:1], np.array([[[3.0, 1.0]], [[0.0, 1.0]]]))
    >>> print(f"{np.asarray(bias)[0, 0]:.3f}")
    0.539

    References:
        Zhang et al., Prompt, Generate, then Cache (arXiv 2303.02151); the released code's `mean`
        normalisation.
    """
    scores = z_score(candidates)
    agreement = (z_score(zero_shot) * scores).sum(-1, keepdims=True)
    return (jax.nn.softmax(agreement, axis=0) * scores).sum(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaFo(Method):
    """CaFo's fusion of two trained caches, one on each encoder.

    The whole of CaFo also generates images for the cache and prompts for the text.

    Attributes:
        beta: .6 on ImageNet with 16 shots.
        sharpness: Sharpness of both caches.
    """

    beta: Number = 0.6
    sharpness: Number = 1.0

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        del key
        keys = {name: task.mean_view(name, self) for name in ("features", "auxiliary")}
        return State(keys, one_hot(task.labels, task.num_classes))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        candidates = [
            cache_logits(
                needed(getattr(inputs, name), name, self),
                keys,
                state.fixed,
                sharpness=self.sharpness,
            )
            for name, keys in state.trained.items()
        ]
        return cafo_bias(inputs.zero_shot, jnp.stack(candidates))


def channel_criterion(
    class_weights: Float[Array, "features classes"],
    *,
    similarity_weight: Number = 0.7,
    variance_weight: Number = 0.3,
) -> Float[jax.Array, " features"]:
    """How well each channel tells classes apart, by the classifier's weights alone.

    ::

        -w0 * mean_{i != j}(W[:, i] W[:, j]) + w1 * var_i(W[:, i])

    Args:
        class_weights: `W`, `[features, classes]`, columns of length one.
        similarity_weight: w0; .7 on ImageNet.
        variance_weight: w1; .3 on ImageNet.

    Returns:
        `[features]`.

    >>> bool(jnp.diff(channel_criterion(jnp.array([[0.6, 0.6], [0.8, -0.8]])))[0] > 0)
    True

    References:
        Zhu et al., Not All Features Matter (arXiv 2304.01195), prior refinement, on text only.
    """
    weights = checks.as_float(class_weights, "class_weights")
    classes = weights.shape[-1]
    pairs = jnp.square(weights.sum(-1)) - jnp.square(weights).sum(-1)
    similarity = pairs / max(classes * (classes - 1), 1)
    variance = jnp.var(weights, axis=-1, ddof=1)
    return jnp.multiply(variance_weight, variance) - jnp.multiply(similarity_weight, similarity)


def label_divergence(
    keys: Float[Array, "n features"],
    class_weights: Float[Array, "features classes"],
    labels: Int[Array, " n"],
) -> Float[jax.Array, " n"]:
    """Bits between an image's label and the unscaled zero-shot prediction for it.

    ::

        -log2 softmax(F @ W)[y]

    >>> print(f"{label_divergence(jnp.eye(2), jnp.eye(2), jnp.array([0, 0]))[1]:.3f}")
    1.895
    """
    log_p = jax.nn.log_softmax(
        checks.as_float(keys, "keys") @ checks.as_float(class_weights, "class_weights")
    )
    hit = one_hot(labels, log_p.shape[-1], log_p.dtype)
    return -(hit * log_p).sum(-1) / jnp.log(2.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class APE(Method):
    """APE, without training: a cache on the channels that tell classes apart.

    Labelled images that the zero-shot classifier finds hard count more.

    Attributes:
        beta: The paper's alpha.
        sharpness: Sharpness of the cache.
        hardness: gamma, of the weight of hard images.
        channels: How many are kept (at most all).
        similarity_weight: Weight of similarity in the criterion.
        variance_weight: Weight of variance in the criterion.
    """

    beta: Number = 2.0
    sharpness: Number = 1.0
    hardness: Number = 0.1
    channels: int = 500
    similarity_weight: Number = 0.7
    variance_weight: Number = 0.3
    trains: ClassVar[bool] = False

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        del key
        weights = needed(task.class_weights, "class_weights", self)
        keys = task.mean_view("features", self)
        criterion = channel_criterion(
            weights,
            similarity_weight=self.similarity_weight,
            variance_weight=self.variance_weight,
        )
        chosen = jax.lax.top_k(criterion, min(self.channels, len(criterion)))[1]
        keys, weights = unit_rows(keys[:, chosen]), unit_rows(weights[chosen].T).T
        hard = jnp.exp(self.hardness * label_divergence(keys, weights, task.labels))
        values = one_hot(task.labels, weights.shape[-1], keys.dtype) * hard[:, None]
        return State(keys, (values, chosen))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        values, chosen = state.fixed
        features = unit_rows(needed(inputs.features, "features", self)[..., chosen])
        return cache_logits(features, state.trained, values, sharpness=self.sharpness)
