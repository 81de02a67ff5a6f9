"""Few-shot methods that look images up or learn weights: caches, probes, LP++, CLAP, ProLIP."""

import dataclasses
from typing import Any, ClassVar, Literal

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
    without_zero_shot,
)
from logitjax.losses import cross_entropy
from logitjax.ops import Array, Number, checks

CLIP_SCALE = 100.0


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
        keys = task.mean_view("features", self)
        return State(keys, one_hot(task.labels, task.num_classes, keys.dtype))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features = needed(inputs.features, "features", self)
        return jnp.exp(-self.sharpness * (1.0 - features @ state.trained.T)) @ state.fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TipAdapterF(TipAdapter):
    """Tip-Adapter-F: the keys of the cache are trained, starting from the labelled images."""

    trains: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRes(Method):
    """TaskRes: a residual of the class weights, initially zero.

    `s_bias = scale f @ R`, exact for `s0 = scale f @ W0`; the released code also scales
    `W0 + beta R` to length one again.

    Attributes:
        beta: The paper's alpha.
        scale: Scale of the zero-shot logits' cosines; CLIP's.
    """

    beta: Number = 1.0
    scale: Number = CLIP_SCALE

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        features = needed(task.support.features, "features", self)
        return State(jnp.zeros((features.shape[-1], task.num_classes), features.dtype), None)

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        return self.scale * needed(inputs.features, "features", self) @ state.trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(Method):
    """A linear classifier of one encoder's features; its bias cancels the zero-shot logits.

    `s_bias = scale * f @ W + b - s0`

    Attributes:
        beta: 1 is the probe alone, less mixes it with the zero-shot logits.
        source: The encoder, `'features'` or `'auxiliary'`.
    """

    source: Literal["features", "auxiliary"] = "features"
    scale: Number = CLIP_SCALE

    @property
    def needs(self) -> tuple[str, ...]:
        return ("auxiliary",) if self.source == "auxiliary" else ()

    def at_scale(self, scale: float) -> "LinearProbe":
        # Starts at zero and has a temperature of its own.
        return self

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        features = task.mean_view(self.source, self)
        kernel = jnp.zeros((features.shape[-1], task.num_classes), features.dtype)
        return State({"kernel": kernel, "bias": jnp.zeros_like(kernel[0])}, None)

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features = needed(getattr(inputs, self.source), self.source, self)
        local = self.scale * features @ state.trained["kernel"] + state.trained["bias"]
        return without_zero_shot(local, inputs.zero_shot)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LPPlusPlus(Method):
    """LP++: prototypes plus class weights with a learned factor for each class.

    Its step sizes follow from the data, so :meth:`init` runs all of its training: gradient descent
    with momentum on all examples, the factors moving every tenth step::

        s = f @ V + b + blend * (f @ W0)
        V0 = class means                    blend0 = 250 mean_k <class mean_k, W0_k>
        lr_V = 4 n / lambda_max(F.T F)      lr_blend = n / (4 max_k sum_n (f_n W0_k)^2)

    The released code departs from it (docs/few_shot.md), and keeps the best iteration on the images
    that will evaluate it. Source: Huang et al., LP++ (CVPR 2024, arXiv 2404.02285).

    Attributes:
        beta: Share of the probe, as in :class:`LinearProbe`.
        blend_every: Number of steps between updates of the factors.
        blend_scale: Initial factors in units of the mean logit of a class's images.
    """

    iterations: int = 300
    momentum: float = 0.9
    blend_every: int = 10
    blend_scale: float = 250.0
    trains: ClassVar[bool] = False

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        weights = needed(task.class_weights, "class_weights", self)
        features = task.mean_view("features", self)
        return State(self._solve(features, jnp.asarray(task.labels), weights), weights)

    def _solve(
        self,
        features: Float[Array, "n features"],
        labels: Int[Array, " n"],
        weights: Float[Array, "features classes"],
    ) -> dict[str, jax.Array]:
        classes = weights.shape[-1]
        present = labels >= 0
        count = jnp.maximum(present.sum(), 1)
        features = jnp.where(present[:, None], features, 0.0)
        # The squared singular values are the eigenvalues of either Gram matrix.
        wide = features.shape[0] < features.shape[1]
        gram = features @ features.T if wide else features.T @ features
        # The paper's step sizes: inverse bounds of the blocks' gradient Lipschitz constants.
        rate = 4.0 * count / jnp.linalg.eigvalsh(gram)[-1]
        text = features @ weights
        blend_rate = count / (4.0 * jnp.square(text).sum(0).max())
        hit = one_hot(labels, classes, features.dtype)
        centroid_logits = (hit * text).sum(0) / jnp.maximum(hit.sum(0), 1)
        blend = jnp.full((classes,), self.blend_scale * centroid_logits.mean(), features.dtype)
        # Prototypes are sums of features; with few images their coefficients are trained.
        share = hit / jnp.maximum(hit.sum(0), 1)
        seen, start = (gram, share) if wide else (features, features.T @ share)

        def loss(logits: jax.Array) -> jax.Array:
            values = cross_entropy(logits, jnp.maximum(labels, 0))  # padding is -1
            return jnp.where(present, values, 0.0).sum() / count

        def step(carry: Any, index: Any) -> tuple[Any, None]:
            (moving, bias), blend, velocity = carry
            slope = jax.grad(loss)(seen @ moving + bias + blend * text)
            down = (slope if wide else features.T @ slope, slope.sum(0))
            velocity = jax.tree.map(lambda v, g: self.momentum * v + g, velocity, down)
            moving, bias = jax.tree.map(lambda x, v: x - rate * v, (moving, bias), velocity)
            # Updates come on the tenth step, not on the first.
            due = index % self.blend_every == self.blend_every - 1
            blend = jnp.where(due, blend - blend_rate * (slope * text).sum(0), blend)
            return ((moving, bias), blend, velocity), None

        first = (start, jnp.zeros((classes,), features.dtype))
        carry = (first, blend, jax.tree.map(jnp.zeros_like, first))
        ((moving, bias), blend, _), _ = jax.lax.scan(step, carry, jnp.arange(self.iterations))
        prototypes = features.T @ moving if wide else moving
        return {"prototypes": prototypes, "bias": bias, "blend": blend}

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features = needed(inputs.features, "features", self)
        local = features @ state.trained["prototypes"] + state.trained["bias"]
        local = local + state.trained["blend"] * (features @ state.fixed)
        return without_zero_shot(local, inputs.zero_shot)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLAP(Method):
    """CLAP: a linear probe kept near the class weights where zero-shot knows the class well.

    ::

        logits = scale f . unit(w_k),    w_k = t_k at first
        loss = cross-entropy + penalty mean_k a_k |w_k - t_k|^2
        a_k = mean over images of class k of softmax(s0)_k

    `penalty=0` is ZS-LP, the probe without the constraint. `a` is fixed, as in the released code
    under the published command, and 0 for a class without images. The released class weights `t_k`
    are means of text features that are not scaled to length one, and the penalty is measured at
    that length: `FewShotTask.class_weights` may have columns of any length here. Source:
    Silva-Rodriguez et al. (CVPR 2024, arXiv 2312.12730).

    Attributes:
        beta: 1 is the probe alone, less mixes it with the zero-shot logits.
        penalty: Factor of the constraint; 1 is published.
    """

    penalty: Number = 1.0
    scale: Number = CLIP_SCALE

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        weights = needed(task.class_weights, "class_weights", self)
        task.check()
        zero_shot = checks.as_float(task.support.zero_shot, "zero_shot")
        labels = jnp.tile(jnp.asarray(task.labels), task.views)
        hit = one_hot(labels, task.num_classes, zero_shot.dtype)
        total = (hit * jax.nn.softmax(zero_shot)).sum(0)
        return State(weights, (weights, total / jnp.maximum(hit.sum(0), 1)))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features = needed(inputs.features, "features", self)
        local = self.scale * features @ unit_rows(state.trained.T).T
        return without_zero_shot(local, inputs.zero_shot)

    def loss(self, state: State, inputs: Inputs, labels: Any) -> jax.Array:
        start, existing = state.fixed
        # Columns are classes.
        moved = jnp.square(state.trained - start).sum(0)
        return super().loss(state, inputs, labels) + self.penalty * (existing * moved).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProLIP(Method):
    """ProLIP: a trained last projection of the encoder, kept near its initial value.

    ::

        logits = scale unit(h P + b) . w_k,    P = P0 at first
        loss = cross-entropy + penalty |P - P0|_F^2

    h is the input of the encoder's last projection, `Inputs.hidden`; `FewShotTask.projection` is
    P0. The norm is a sum, as released. Source: Fahes et al. (arXiv 2410.05270).

    Attributes:
        beta: 1 is the method alone, less mixes it with the zero-shot logits.
        penalty: lambda; 10 to .0001 and 0 are searched. None means 1 / shots, the authors' choice
            without validation images, for any learning rate from 1e-5 to 1e-2.
    """

    penalty: Number | None = None
    scale: Number = CLIP_SCALE
    needs: ClassVar[tuple[str, ...]] = ("hidden", "projection")

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        task.check()
        weights = needed(task.class_weights, "class_weights", self)
        projection = needed(task.projection, "projection", self)
        bias = task.projection_bias
        if bias is None:
            bias = jnp.zeros(projection.shape[-1:], projection.dtype)
        bias = checks.as_float(bias, "projection_bias")
        return State(projection, (projection, self._penalty(task), bias, weights))

    def _penalty(self, task: FewShotTask) -> jax.Array:
        return jnp.asarray(1 / task.shots if self.penalty is None else self.penalty)

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        hidden = needed(inputs.hidden, "hidden", self)
        *_, bias, weights = state.fixed
        local = self.scale * unit_rows(hidden @ state.trained + bias) @ weights
        return without_zero_shot(local, inputs.zero_shot)

    def loss(self, state: State, inputs: Inputs, labels: Any) -> jax.Array:
        moved = jnp.square(state.trained - state.fixed[0]).sum()
        return super().loss(state, inputs, labels) + state.fixed[1] * moved


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProLIPText(ProLIP):
    """ProLIP on the text side: a trained last projection of the texts.

    `logits = scale f . unit(mean_p h_kp P)` with the loss of `ProLIP`; h are the features of class
    k's prompts before `FewShotTask.text_projection`. Prompts are not scaled to length one before
    their mean, as released, so the initial classifier is not quite zero-shot.
    """

    needs: ClassVar[tuple[str, ...]] = ("texts", "text_projection")

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        task.check()
        projection = needed(task.text_projection, "text_projection", self)
        # A mean of linear maps is the map of a mean.
        texts = needed(task.texts, "texts", self).mean(1)
        return State(projection, (projection, self._penalty(task), texts))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features = needed(inputs.features, "features", self)
        weights = unit_rows(state.fixed[-1] @ state.trained)
        return without_zero_shot(self.scale * features @ weights.T, inputs.zero_shot)
