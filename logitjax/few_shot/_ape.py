"""APE and APE-T: caches on the channels that tell classes apart."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.few_shot._cache_adapters import cache_logits
from logitjax.few_shot._method import FewShotTask, Inputs, Method, State, needed, one_hot, unit_rows
from logitjax.ops import Array, Number, checks


def channel_criterion(
    class_weights: Float[Array, "features classes"],
    *,
    keys: Float[Array, "n features"] | None = None,
    labels: Int[Array, " n"] | None = None,
    similarity_weight: Number = 0.7,
    variance_weight: Number = 0.3,
) -> Float[jax.Array, " features"]:
    """How well each channel tells classes apart, by the classifier's weights and perhaps images.

    ::

        -w0 * mean_{i != j}(A[:, i] A[:, j]) / (s + 1)^2 + w1 * var_i(W[:, i])

    A is W plus the sum of each class's s keys (the mean number where classes differ), or W alone
    without keys and s 0; the released code takes the keys.

    References:
        Zhu et al., Not All Features Matter (arXiv 2304.01195), prior refinement.
    """
    weights = checks.as_float(class_weights, "class_weights")
    classes = weights.shape[-1]
    seen, parts = weights, 1.0
    if keys is not None:
        hit = one_hot(labels, classes, weights.dtype)
        seen = weights + checks.as_float(keys, "keys").T @ hit
        parts = 1.0 + hit.sum() / classes
    pairs = jnp.square(seen.sum(-1)) - jnp.square(seen).sum(-1)
    similarity = pairs / (max(classes * (classes - 1), 1) * parts**2)
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
        criterion: What the channels are chosen by: `'text'`, or `'text_and_keys'` as released.
    """

    beta: Number = 2.0
    sharpness: Number = 1.0
    hardness: Number = 0.1
    channels: int = 500
    similarity_weight: Number = 0.7
    variance_weight: Number = 0.3
    criterion: Literal["text", "text_and_keys"] = "text_and_keys"
    trains: ClassVar[bool] = False

    def _chosen(self, task: FewShotTask, keys: jax.Array, weights: jax.Array) -> jax.Array:
        """Numbers of the channels that are kept."""
        by_keys = self.criterion == "text_and_keys"
        criterion = channel_criterion(
            weights,
            keys=keys if by_keys else None,
            labels=task.labels if by_keys else None,
            similarity_weight=self.similarity_weight,
            variance_weight=self.variance_weight,
        )
        return jax.lax.top_k(criterion, min(self.channels, len(criterion)))[1]

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        del key
        weights = needed(task.class_weights, "class_weights", self)
        keys = task.mean_view("features", self)
        chosen = self._chosen(task, keys, weights)
        keys, weights = unit_rows(keys[:, chosen]), unit_rows(weights[chosen].T).T
        hard = jnp.exp(self.hardness * label_divergence(keys, weights, task.labels))
        values = one_hot(task.labels, weights.shape[-1], keys.dtype) * hard[:, None]
        return State(keys, (values, chosen))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        values, chosen = state.fixed
        features = unit_rows(needed(inputs.features, "features", self)[..., chosen])
        return cache_logits(features, state.trained, values, sharpness=self.sharpness)


@dataclasses.dataclass(frozen=True, kw_only=True)
class APET(APE):
    """APE-T: residuals of the classes on APE's channels, trained with a weight for each key.

    ::

        s = scale f (W0 + R') + beta exp(-b (1 - f (F + R_y)')) @ (v L)

    R, zero at first, is of the chosen channels only and enters the class weights and the keys of
    its class alike; nothing is scaled to length one again, and keys have all their channels. The
    weights v of the keys are 1 at first; `hardness` plays no part, as in the released training.

    Attributes:
        similarity_weight: .2 is published for training.
        variance_weight: .8 is published for training.
        scale: Scale of the zero-shot logits' cosines; CLIP's.
    """

    similarity_weight: Number = 0.2
    variance_weight: Number = 0.8
    scale: Number = 100.0
    trains: ClassVar[bool] = True

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        del key
        weights = needed(task.class_weights, "class_weights", self)
        keys = task.mean_view("features", self)
        chosen = self._chosen(task, keys, weights)
        values = one_hot(task.labels, task.num_classes, keys.dtype)
        residual = jnp.zeros((task.num_classes, len(chosen)), keys.dtype)
        trained = {"residual": residual, "weights": jnp.ones(len(keys), keys.dtype)}
        return State(trained, (keys, values, chosen))

    def _parts(self, state: State, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """What the residuals add to the zero-shot logits, and the cache's logits."""
        keys, values, chosen = state.fixed
        residual = state.trained["residual"]
        features = needed(inputs.features, "features", self)
        moved = keys.at[:, chosen].add(values @ residual)
        weighted = values * state.trained["weights"][:, None]
        cached = cache_logits(features, moved, weighted, sharpness=self.sharpness)
        return self.scale * features[..., chosen] @ residual.T, cached

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        return self._parts(state, inputs)[1]

    def logits(self, state: State, inputs: Inputs) -> jax.Array:
        text, cached = self._parts(state, inputs)
        return checks.as_float(inputs.zero_shot, "zero_shot") + text + self.beta * cached
