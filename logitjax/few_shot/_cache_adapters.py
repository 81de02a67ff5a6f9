"""Few-shot methods that compare images with the labelled ones: Tip-Adapter."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from logitjax.few_shot._method import FewShotTask, Inputs, Method, State, needed, one_hot
from logitjax.ops import Array, Number, checks


def cache_logits(features: Array, keys: Array, values: Array, sharpness: Number) -> jax.Array:
    """Labels of the cached images weighted by similarity: `exp(-b (1 - f @ F.T)) @ L`."""
    affinity = checks.as_float(features, "features") @ checks.as_float(keys, "keys").T
    return jnp.exp(-sharpness * (1.0 - affinity)) @ checks.as_float(values, "values")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TipAdapter(Method):
    """Tip-Adapter: a cache of the labelled images, without training.

    `s_bias = exp(-b (1 - f @ F.T)) @ L` (Zhang et al., arXiv 2207.09519, eq. 4). The released code
    searches sharpness and beta on the evaluation set; search them on other data.

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
        return cache_logits(features, state.trained, state.fixed, self.sharpness)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TipAdapterF(TipAdapter):
    """Tip-Adapter-F: the keys of the cache are trained, starting from the labelled images."""

    trains: ClassVar[bool] = True
