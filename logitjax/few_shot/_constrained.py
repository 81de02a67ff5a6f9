"""Few-shot methods that keep what they train near the zero-shot classifier: CLAP, ZS-LP, ProLIP."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from logitjax.few_shot._linear_adapters import CLIP_SCALE
from logitjax.few_shot._method import (
    FewShotTask,
    Inputs,
    Method,
    State,
    needed,
    one_hot,
    unit_rows,
    without_zero_shot,
)
from logitjax.ops import Number, checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLAP(Method):
    """CLAP: a linear probe held near the class weights where zero-shot knows the class well.

    ::

        logits = scale f . unit(w_k),    w_k = t_k at first
        loss = cross-entropy + penalty mean_k a_k |w_k - t_k|^2
        a_k = mean over images of class k of softmax(s0)_k

    `penalty=0` is ZS-LP, the probe without the constraint. `a` is fixed, as in the released code
    under the published command; a class without an image has none. The released class weights
    `t_k` are means of text features that are not scaled to length one, and the penalty is measured
    at that length: `FewShotTask.class_weights` may have columns of any length here.

    Attributes:
        beta: 1 is the probe by itself, less mixes it with the zero-shot logits.
        penalty: Factor of the constraint; 1 is published.
        scale: Scale of the cosines.

    References:
        Silva-Rodriguez et al., A Closer Look at the Few-Shot Adaptation of Large Vision-Language
        Models (CVPR 2024, arXiv 2312.12730).
    """

    penalty: Number = 1.0
    scale: Number = CLIP_SCALE

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        del key
        weights = needed(task.class_weights, "class_weights", self)
        task.check()
        zero_shot = checks.as_float(task.support.zero_shot, "zero_shot")
        labels = jnp.tile(jnp.asarray(task.labels), task.views)
        hit = one_hot(labels, task.num_classes, zero_shot.dtype)
        own = (hit * jax.nn.softmax(zero_shot)).sum(0)
        return State(weights, (weights, own / jnp.maximum(hit.sum(0), 1)))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features = needed(inputs.features, "features", self)
        own = self.scale * features @ unit_rows(state.trained.T).T
        return without_zero_shot(own, inputs.zero_shot)

    def loss(self, state: State, inputs: Inputs, labels: Any) -> jax.Array:
        start, known = state.fixed
        moved = jnp.square(state.trained - start).sum(0)
        return super().loss(state, inputs, labels) + self.penalty * (known * moved).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProLIP(Method):
    """ProLIP: the encoder's last projection is trained, held near what it was.

    ::

        logits = scale unit(h P + b) . w_k,    P = P0 at first
        loss = cross-entropy + penalty |P - P0|_F^2

    h is what the encoder projects last, `Inputs.hidden`; `FewShotTask.projection` has P0. The norm
    is a sum, as released. Without validation images the authors take `penalty = 1 / shots` and any
    rate of 1e-5 to 1e-2.

    Attributes:
        beta: 1 is the method by itself, less mixes it with the zero-shot logits.
        penalty: lambda; 10 to .0001 and 0 are searched.
        scale: Scale of the cosines.

    References:
        Fahes et al., CLIP's Visual Embedding Projector is a Few-shot Cornucopia (arXiv 2410.05270).
    """

    penalty: Number = 0.1
    scale: Number = CLIP_SCALE

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        del key
        task.check()
        weights = needed(task.class_weights, "class_weights", self)
        projection = needed(task.projection, "projection", self)
        bias = task.projection_bias
        if bias is None:
            bias = jnp.zeros(projection.shape[-1:], projection.dtype)
        return State(projection, (projection, checks.as_float(bias, "projection_bias"), weights))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        hidden = needed(inputs.hidden, "hidden", self)
        _, bias, weights = state.fixed
        own = self.scale * unit_rows(hidden @ state.trained + bias) @ weights
        return without_zero_shot(own, inputs.zero_shot)

    def loss(self, state: State, inputs: Inputs, labels: Any) -> jax.Array:
        moved = jnp.square(state.trained - state.fixed[0]).sum()
        return super().loss(state, inputs, labels) + self.penalty * moved
