"""ReHARK: kernel regression with two widths, from class weights that the pictures refine."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

from logitjax.few_shot._method import (
    FewShotTask,
    Inputs,
    Method,
    State,
    class_means,
    needed,
    one_hot,
    unit_rows,
    without_zero_shot,
)
from logitjax.ops import Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReHARK(Method):
    """ReHARK without statistics of the test pictures, so that each is classified by itself.

    ::

        x = unit(sign(x) |x|^power);    P = unit((1 - refine) W0 + refine unit(class means))
        S = [F, unit(F + bridge P_y)];  k = mix exp(-wide |.|^2) + (1 - mix) exp(-narrow |.|^2)
        A = (k(S, S) + penalty I)^-1 (Y - text S P');    logits = scale (f P' + k(f, S) A / text)

    The order of the classes is that of the released code at `soft = var_adj = 0` and one set of
    texts. The authors search eleven numbers in 1,000 trials for each data set.

    Attributes:
        beta: 1 is the method by itself, less mixes it with the zero-shot logits.
        wide: beta1; .1 to 30 are searched.
        narrow: beta2; .01 to 5 are searched.
        mix: Share of the first kernel.
        penalty: lambda; .001 to 5 are searched.
        text: Weight of the text beside the kernel; 1 to 20 are searched.
        refine: Share of the class means in the class weights.
        bridge: Share of the class weights in the second half of the examples.
        power: Exponent of every channel; .5 to 1 are searched.
        scale: Scale of the zero-shot logits' cosines.

    References:
        ReHARK (arXiv 2603.11542).
    """

    wide: Number = 5.0
    narrow: Number = 0.5
    mix: Number = 0.5
    penalty: Number = 0.1
    text: Number = 4.0
    refine: Number = 0.3
    bridge: Number = 0.5
    power: Number = 0.8
    scale: Number = 100.0
    trains: ClassVar[bool] = False

    def _shaped(self, rows: jax.Array) -> jax.Array:
        # The gradient of |x|^p at 0 is not asked for: nothing trains.
        return unit_rows(jnp.sign(rows) * jnp.abs(rows) ** self.power)

    def _kernel(self, left: jax.Array, right: jax.Array) -> jax.Array:
        squares = 2.0 - 2.0 * left @ right.T  # rows of length one
        wide, narrow = jnp.exp(-self.wide * squares), jnp.exp(-self.narrow * squares)
        return self.mix * wide + jnp.subtract(1.0, self.mix) * narrow

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        del key
        features, labels = task.every_view("features", self)
        weights = self._shaped(needed(task.class_weights, "class_weights", self).T)
        features = self._shaped(features)
        means = unit_rows(class_means(features, labels, task.num_classes).T)
        prior = unit_rows(jnp.subtract(1.0, self.refine) * weights + self.refine * means)
        there = jnp.tile(labels >= 0, 2)
        hit = jnp.tile(one_hot(labels, task.num_classes, features.dtype), (2, 1))
        bridged = unit_rows(features + self.bridge * prior[jnp.maximum(labels, 0)])
        keys = jnp.concatenate([features, bridged])
        rest = jnp.where(there[:, None], hit - self.text * keys @ prior.T, 0.0)
        # Padding sees only the identity.
        kernel = jnp.where(there[:, None] & there, self._kernel(keys, keys), 0.0)
        factor = cho_factor(kernel + self.penalty * jnp.eye(len(keys), dtype=keys.dtype))
        return State(cho_solve(factor, rest), (keys, prior))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        keys, prior = state.fixed
        features = self._shaped(needed(inputs.features, "features", self))
        kernel = self._kernel(features, keys) @ state.trained
        own = self.scale * (features @ prior.T + kernel / self.text)
        return without_zero_shot(own, inputs.zero_shot)
