"""Few-shot methods that look images up among the labelled ones: Tip-Adapter, CaFo, DMN."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

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


def cache_logits(features: Array, keys: Array, values: Array, sharpness: Number) -> jax.Array:
    """Labels of the cached images by how near they are: `exp(-b (1 - f @ F.T)) @ L`."""
    affinity = checks.as_float(features, "features") @ checks.as_float(keys, "keys").T
    return jnp.exp(-sharpness * (1.0 - affinity)) @ checks.as_float(values, "values")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TipAdapter(Method):
    """Tip-Adapter: a cache of the labelled images, without training.

    ::

        s_bias = exp(-b (1 - f @ F.T)) @ L

    The released code searches sharpness and beta on the evaluation set; search them on other data.

    Attributes:
        beta: The paper's alpha; 1.17 on ImageNet.
        sharpness: The paper's beta.

    References:
        Zhang et al., Tip-Adapter (arXiv 2207.09519), eq. 4.
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
        return cache_logits(features, state.trained, state.fixed, self.sharpness)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TipAdapterF(TipAdapter):
    """Tip-Adapter-F: the keys of the cache are trained, from the labelled images on."""

    trains: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaFo(Method):
    """CaFo's fusion of two trained caches, one on each encoder.

    The whole of CaFo also generates images for the cache and prompts for the text. Standardised
    logits are weighted by agreement with zero-shot, the released code's `mean` normalisation::

        s_bias = sum_m p_m z(c_m),    p = softmax_m(<z(s0), z(c_m)>)

    Attributes:
        beta: .6 on ImageNet with 16 shots.
        sharpness: Sharpness of both caches.

    References:
        Zhang et al., Prompt, Generate, then Cache (arXiv 2303.02151).
    """

    beta: Number = 0.6
    sharpness: Number = 1.0
    needs: ClassVar[tuple[str, ...]] = ("auxiliary",)

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        del key
        keys = {name: task.mean_view(name, self) for name in ("features", "auxiliary")}
        return State(keys, one_hot(task.labels, task.num_classes))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        given = {name: needed(getattr(inputs, name), name, self) for name in state.trained}
        caches = [
            cache_logits(given[name], keys, state.fixed, self.sharpness)
            for name, keys in state.trained.items()
        ]
        scores = z_score(jnp.stack(caches))  # [caches, *batch, classes]
        # A cache weighs as much as it agrees with the zero-shot logits of the same picture.
        agreement = (z_score(inputs.zero_shot) * scores).sum(-1, keepdims=True)
        return (jax.nn.softmax(agreement, axis=0) * scores).sum(0)


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
        # Place 0 is the text's.
        memory = jnp.zeros((classes, self.shots + 1, keys.shape[-1]), keys.dtype)
        memory = memory.at[:, 0].set(weights.T).at[where].set(keys, mode="drop")
        there = jnp.zeros(memory.shape[:2], bool).at[:, 0].set(True)
        return State(memory, there.at[where].set(True, mode="drop"))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features = needed(inputs.features, "features", self)
        memory = state.trained
        cosines = jnp.einsum("kld,...d->...kl", memory, features)  # [*batch, classes, places]
        recalled = jnp.where(state.fixed, jnp.exp(-self.sharpness * (1.0 - cosines)), 0.0)
        # The length of sum_l a_l M_l without an array of features for each image and class.
        gram = jnp.einsum("kld,kmd->klm", memory, memory)
        square = jnp.einsum("...kl,klm,...km->...k", recalled, gram, recalled)
        length = jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))
        return jnp.multiply(self.scale, (recalled * cosines).sum(-1) / length)
