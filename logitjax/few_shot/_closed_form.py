"""Few-shot methods that solve a linear system instead of training: GDA, ProKeR, ReHARK, TIMO."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Float, Int

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
from logitjax.ops import Array, Number, checks

_HIGHEST = jax.lax.Precision.HIGHEST


def gaussian_classifier(
    features: Float[Array, "n features"], labels: Int[Array, " n"], num_classes: int
) -> tuple[Float[jax.Array, "features classes"], Float[jax.Array, " classes"]]:
    """Gaussian discriminant analysis with one covariance, shrunk towards its mean variance.

    ::

        mu_k = mean of class k;  C = f - mu_y;  t = |C|^2 / (n - 1)
        P = d (C'C + t I)^-1;    W_k = P mu_k;  b_k = -log K - mu_k' P mu_k / 2

    The condition of `C'C + t I` is at most n, so a Cholesky factor suffices where the released code
    uses a pseudo-inverse. A class without an example has zero weights and the mean bias of the
    others; if no class has two examples, all are zero.
    """
    checks.shapes(features=(features, "float n features"), labels=(labels, "int n"))
    features, labels = checks.as_float(features, "features"), jnp.asarray(labels)
    count, width = features.shape
    present = labels >= 0
    means = class_means(features, labels, num_classes)
    small = jnp.where(present[:, None], features - means.T[jnp.maximum(labels, 0)], 0.0)
    # |C|^2 / (n - 1), as in the released code.
    trace = jnp.square(small).sum() / jnp.maximum(present.sum() - 1, 1)
    flat = trace == 0
    trace = jnp.where(flat, 1.0, trace)
    # Fewer images than channels: by Woodbury's identity an n x n system replaces the d x d one.
    if count < width:
        inner = cho_factor(small @ small.T + trace * jnp.eye(count, dtype=features.dtype))
        weights = width / trace * (means - small.T @ cho_solve(inner, small @ means))
    else:
        gram = jnp.matmul(small.T, small, precision=_HIGHEST)
        shrunk = gram + trace * jnp.eye(width, dtype=features.dtype)
        factor = cho_factor(shrunk)
        weights = cho_solve(factor, means)
        # One step of refinement, because the condition may be as large as n.
        rest = means - jnp.matmul(shrunk, weights, precision=_HIGHEST)
        weights = width * (weights + cho_solve(factor, rest))
    existing = one_hot(labels, num_classes).any(0)
    # Equal priors: log p(k) - mu_k^T Sigma^-1 mu_k / 2.
    bias = -jnp.log(float(num_classes)) - (means * weights).sum(0) / 2
    bias = jnp.where(existing, bias, bias.mean(where=existing))
    return jnp.where(flat, 0.0, weights), jnp.where(flat, 0.0, bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GDA(Method):
    """Gaussian discriminant analysis on the labelled images, with every view as an example.

    `s_bias = f @ W + b`, with W and b from Gaussian classes with one covariance (Wang et al., ICLR
    2024, arXiv 2402.04087). The released code chooses beta on all validation images of a data set,
    or on the test images of ImageNet.

    Attributes:
        beta: .0001 to 100 in factors of ten are searched.
    """

    trains: ClassVar[bool] = False

    def check(self, task: FewShotTask) -> None:
        """Refuse images without two of the same class, which give no covariance."""
        task.check()
        if isinstance(task.labels, Tracer):
            return
        existing = np.tile(np.asarray(task.labels), task.views)
        existing = existing[existing >= 0]
        if len(np.unique(existing)) == len(existing):
            raise ValueError(
                "labels: expected two images, or two views, of some class, to estimate GDA's "
                "covariance, got one of each"
            )

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        """The state before any gradient step, here the final one; errors as for `check`."""
        self.check(task)
        features, labels = task.every_view("features", self)
        weights, bias = gaussian_classifier(features, labels, task.num_classes)
        return State({"kernel": weights, "bias": bias}, None)

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features = needed(inputs.features, "features", self)
        return features @ state.trained["kernel"] + state.trained["bias"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProKeR(Method):
    """ProKeR: kernel regression of the residuals of the zero-shot classifier on the labels.

    ::

        k(a, b) = exp(-sharpness (1 - a.b));   R = Y - F W0
        alpha = (K / penalty + I)^-1 R         penalty times kernel ridge regression, as released
        s_bias = scale k(f, F) alpha

    Cosines of the class weights enter without a scale, so `scale` gives the bias the scale of the
    zero-shot logits; the order of the classes is that of the released `f W0 + k alpha`. Every view
    of an image is an example. A penalty near 0 leaves the zero-shot classifier, and a large one
    makes it a cache of residuals. Source: Bendou et al., ProKeR (CVPR 2025, arXiv 2501.11175).

    Attributes:
        sharpness: kappa; 1.5 to 10 are searched on ImageNet.
        penalty: lambda; .05 to .25 are searched on ImageNet.
    """

    sharpness: Number = 3.0
    penalty: Number = 0.25
    scale: Number = 100.0
    trains: ClassVar[bool] = False

    def _kernel(self, left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.exp(-self.sharpness * (1.0 - left @ right.T))

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        weights = needed(task.class_weights, "class_weights", self)
        features, labels = task.every_view("features", self)
        present = labels >= 0
        rest = one_hot(labels, task.num_classes, features.dtype) - features @ weights
        rest = jnp.where(present[:, None], rest, 0.0)
        # Rows of padding contain only the identity.
        kernel = jnp.where(present[:, None] & present, self._kernel(features, features), 0.0)
        eye = jnp.eye(len(features), dtype=features.dtype)
        # The same system for every penalty, including the limit 0.
        safe = jnp.where(jnp.greater(self.penalty, 0), self.penalty, 1.0)
        alpha = safe * cho_solve(cho_factor(kernel + safe * eye), rest)
        alpha = jnp.where(jnp.greater(self.penalty, 0), alpha, 0.0)
        return State(alpha, features)

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features = needed(inputs.features, "features", self)
        return self.scale * (self._kernel(features, state.fixed) @ state.trained)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReHARK(Method):
    """ReHARK without statistics of the test pictures, so each is classified independently.

    ::

        x = unit(sign(x) |x|^power);    P = unit((1 - refine) W0 + refine unit(class means))
        S = [F, unit(F + bridge P_y)];  k = mix exp(-wide |.|^2) + (1 - mix) exp(-narrow |.|^2)
        A = (k(S, S) + penalty I)^-1 (Y - text S P');    logits = scale (f P' + k(f, S) A / text)

    Classes are in the order of ReHARK's code (arXiv 2603.11542) at `soft = var_adj = 0`.

    Attributes:
        wide: beta1; .1 to 30 are searched.
        narrow: beta2, .01 to 5.
        mix: Share of the first kernel.
        penalty: lambda, .001 to 5.
        text: Weight of the text relative to the kernel, 1 to 20.
        refine: Share of the class means in the class weights.
        bridge: Share of the class weights in the second half of the examples.
        power: Exponent of every channel, .5 to 1.
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
        return unit_rows(jnp.sign(rows) * jnp.abs(rows) ** self.power)

    def _kernel(self, left: jax.Array, right: jax.Array) -> jax.Array:
        # Rows have length one.
        squares = 2.0 - 2.0 * left @ right.T
        wide, narrow = jnp.exp(-self.wide * squares), jnp.exp(-self.narrow * squares)
        return narrow + self.mix * (wide - narrow)

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        features, labels = task.every_view("features", self)
        weights = self._shaped(needed(task.class_weights, "class_weights", self).T)
        features = self._shaped(features)
        means = unit_rows(class_means(features, labels, task.num_classes).T)
        prior = unit_rows(jnp.subtract(1.0, self.refine) * weights + self.refine * means)
        present = jnp.tile(labels >= 0, 2)
        hit = jnp.tile(one_hot(labels, task.num_classes, features.dtype), (2, 1))
        bridged = unit_rows(features + self.bridge * prior[jnp.maximum(labels, 0)])
        keys = jnp.concatenate([features, bridged])
        rest = jnp.where(present[:, None], hit - self.text * keys @ prior.T, 0.0)
        # Rows of padding contain only the identity.
        kernel = jnp.where(present[:, None] & present, self._kernel(keys, keys), 0.0)
        factor = cho_factor(kernel + self.penalty * jnp.eye(len(keys), dtype=keys.dtype))
        return State(cho_solve(factor, rest), (keys, prior))

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        keys, prior = state.fixed
        features = self._shaped(needed(inputs.features, "features", self))
        kernel = self._kernel(features, keys) @ state.trained
        local = self.scale * (features @ prior.T + kernel / self.text)
        return without_zero_shot(local, inputs.zero_shot)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TIMO(Method):
    """TIMO: Gaussian discriminant analysis of pictures and texts that pictures weight.

    ::

        m_p = v . t_p, v the class's mean picture
        w = unit(sum_p softmax_p(sharpness m / |m|) t_p)
        logits = text f . w + f W + b,   W, b of `GDA` on all views and on the `kept` texts with the
                                         largest m, each times its m

    The logits are not at CLIP's scale, as released. TIMO-S also chooses `sharpness` and `kept`;
    `Candidate.all` includes the released search. Sharpness is 1 on ImageNet and 100 on Flowers. A
    class without a picture weights all its texts equally. Source: Li et al. (arXiv 2412.11375),
    which uses the zero-shot classifier only through its texts.

    Attributes:
        beta: 1 is the method alone, less mixes it with the zero-shot logits.
        text: alpha; .0001 to 10,000 in factors of ten are searched.
        sharpness: gamma.
        kept: Number of a class's texts among the examples, the best first: 0 means one, 1
            twice as many as there are; beyond that number the best count twice. None: all once.
        pictures: Weight of `f W + b`; 0 while TIMO-S chooses `sharpness`.
    """

    text: Number = 10.0
    sharpness: Number = 50.0
    kept: Number | None = None
    pictures: Number = 1.0
    trains: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("texts",)

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        texts = needed(task.texts, "texts", self)
        if task.text_projection is not None:
            texts = texts @ needed(task.text_projection, "text_projection", self)
        texts = unit_rows(texts)  # [classes, prompts, features]
        classes, prompts, width = texts.shape
        means = unit_rows(class_means(task.mean_view("features", self), task.labels, classes).T)
        existing = one_hot(task.labels, classes).any(0)[:, None]
        match = jnp.where(existing, jnp.einsum("cpd,cd->cp", texts, means), 1.0)
        length = jnp.linalg.norm(match, axis=-1, keepdims=True)
        share = jax.nn.softmax(self.sharpness * match / length)
        guided = unit_rows(jnp.einsum("cp,cpd->cd", share, texts))
        best = jnp.argsort(-match)[..., None]
        taught = jnp.take_along_axis(texts * match[..., None], best, 1)
        labels = jnp.broadcast_to(jnp.arange(classes)[:, None], match.shape)
        if self.kept is not None:
            # Beyond all texts, the best repeat. For thirds, rounding may change a count by one.
            taught, count = jnp.concatenate([taught, taught], 1), 1 + self.kept * (2 * prompts - 1)
            used = jnp.arange(2 * prompts) < jnp.floor(count + 1e-4)
            labels = jnp.where(used, jnp.arange(classes)[:, None], -1)
        features, of_features = task.every_view("features", self)
        kernel, bias = gaussian_classifier(
            jnp.concatenate([taught.reshape(-1, width), features]),
            jnp.concatenate([labels.reshape(-1), jnp.asarray(of_features)]),
            classes,
        )
        return State({"kernel": kernel, "bias": bias, "guided": guided}, None)

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features, learnt = needed(inputs.features, "features", self), state.trained
        seen = features @ learnt["kernel"] + learnt["bias"]
        local = self.text * features @ learnt["guided"].T + self.pictures * seen
        return without_zero_shot(local, inputs.zero_shot)
