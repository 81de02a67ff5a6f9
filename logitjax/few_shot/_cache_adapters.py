"""Few-shot methods that look images up among the labelled ones: Tip-Adapter, CaFo, Tip-X, DMN."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.few_shot._method import (
    FewShotTask,
    Inputs,
    Method,
    State,
    needed,
    one_hot,
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

    References:
        Zhang et al., Prompt, Generate, then Cache (arXiv 2303.02151); the released code's `mean`
        normalisation.
    """
    scores = z_score(candidates)
    # A cache weighs as much as it agrees with the zero-shot logits of the same picture.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TipX(TipAdapter):
    """Tip-X: Tip-Adapter beside a cache over what the zero-shot classifier says of the images.

    ::

        p = softmax(f W0 / temperature);    u_i = KL(p || p_i)
        s_bias = exp(-b (1 - f F')) L - text_share u' L

    u' is u on the scale of the cosines: u's range among the labelled images becomes that of their
    cosines. The released code takes both ranges over all test images, which is transductive, and
    those of the divergences from the validation images.

    Attributes:
        beta: The paper's alpha.
        text_share: The paper's gamma over its alpha.
        temperature: Of the probabilities of cosines without a scale; .5 is published.

    References:
        Udandarao et al., SuS-X (ICCV 2023, arXiv 2211.16198).
    """

    text_share: Number = 0.1
    temperature: Number = 0.5

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        weights = needed(task.class_weights, "class_weights", self)
        keys, values = super().init(task, key=key)
        log_p = jax.nn.log_softmax(keys @ weights / self.temperature)
        there = values.any(-1)
        pairs = there[:, None] & there

        def bounds(of: jax.Array) -> tuple[jax.Array, jax.Array]:
            least = jnp.where(pairs, of, jnp.inf).min()
            return least, jnp.where(pairs, of, -jnp.inf).max()

        low, high = bounds(self._divergence(log_p, log_p))
        near, far = bounds(keys @ keys.T)
        # Divergences are mapped to the range of the cosines, as in the paper.
        slope = (far - near) / jnp.where(high > low, high - low, 1.0)
        # u' = slope u + shift
        return State(keys, (values, log_p, weights, slope, near - slope * low))

    @staticmethod
    def _divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        """`KL(p || q_i)` for every row of q."""
        p = jnp.exp(log_p)
        return (p * log_p).sum(-1, keepdims=True) - p @ log_q.T

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        values, log_q, weights, slope, shift = state.fixed
        features = needed(inputs.features, "features", self)
        log_p = jax.nn.log_softmax(features @ weights / self.temperature)
        text = slope * self._divergence(log_p, log_q) + shift
        cached = cache_logits(features, state.trained, values, sharpness=self.sharpness)
        return cached - self.text_share * (text @ values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMN(Method):
    """The static memory of DMN: each class is what an image recalls of its text and its images.

    ::

        a_l = exp(-sharpness (1 - M_l . f));    s_bias_k = scale f . unit(sum_l a_l M_l)

    where l goes over the class weight and the labelled images of class k. The dynamic memory of the
    paper, of test images, is not here: it adapts at test time.

    Attributes:
        beta: A table of one weight a data set is published.
        sharpness: 5.5 is published.
        shots: Images of a class that the memory has room for, the first ones.
        scale: Scale of the cosines.

    References:
        Zhang et al., Dual Memory Networks (CVPR 2024, arXiv 2403.17589).
    """

    sharpness: Number = 5.5
    shots: int = 16
    scale: Number = 100.0
    trains: ClassVar[bool] = False

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        del key
        weights = needed(task.class_weights, "class_weights", self)
        keys = task.mean_view("features", self)
        classes = task.num_classes
        labels = jnp.asarray(task.labels)
        hit = one_hot(labels, classes, jnp.int32)
        # An image's place among those of its class; what has none goes where nothing is kept.
        place = (jnp.cumsum(hit, 0) * hit).sum(-1)
        fits = (place > 0) & (place <= self.shots)
        where = jnp.where(fits, labels, classes), jnp.where(fits, place, 0)
        memory = jnp.zeros((classes, self.shots + 1, keys.shape[-1]), keys.dtype)
        memory = memory.at[:, 0].set(weights.T).at[where].set(keys, mode="drop")
        there = jnp.zeros(memory.shape[:2], bool).at[:, 0].set(True)
        return State(memory, there.at[where].set(True, mode="drop"))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features = needed(inputs.features, "features", self)
        memory = state.trained
        cosines = jnp.einsum("kld,...d->...kl", memory, features)
        recalled = jnp.where(state.fixed, jnp.exp(-self.sharpness * (1.0 - cosines)), 0.0)
        # The length of sum_l a_l M_l without an array of features for each image and class.
        gram = jnp.einsum("kld,kmd->klm", memory, memory)
        square = jnp.einsum("...kl,klm,...km->...k", recalled, gram, recalled)
        length = jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))
        return jnp.multiply(self.scale, (recalled * cosines).sum(-1) / length)
