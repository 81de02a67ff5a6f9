"""TIMO: pictures select and weight the texts of a class, which then join the pictures."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from logitjax.few_shot._closed_form import gaussian_classifier
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
class TIMO(Method):
    """TIMO: Gaussian discriminant analysis of pictures and texts that pictures weight.

    ::

        m_p = v . t_p, v the class's mean picture
        w = unit(sum_p softmax_p(sharpness m / |m|) t_p)
        logits = text f . w + f W + b,   W, b of `GDA` on all views and on the `kept` texts of the
                                         largest m, each times its m

    The logits are not at CLIP's scale, as released. TIMO-S also chooses `sharpness` (5 to 100) and
    `kept`, for which the paper tries every count of texts up to twice their number, and
    `Candidate.all` a half, all and twice all. On ImageNet sharpness is 1, on Flowers 100. A class
    without a picture weights all its texts equally. Source: Li et al. (arXiv 2412.11375), which
    uses the zero-shot classifier only through its texts.

    Attributes:
        beta: 1 is the method alone, less mixes it with the zero-shot logits.
        text: alpha; .0001 to 10,000 in factors of ten are searched.
        sharpness: gamma.
        kept: Share of a class's texts among the examples, the best first; more than 1 counts the
            best of them twice. None for all.
    """

    text: Number = 10.0
    sharpness: Number = 50.0
    kept: Number | None = None
    trains: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("texts",)

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        del key
        texts = needed(task.texts, "texts", self)
        if task.text_projection is not None:
            texts = texts @ needed(task.text_projection, "text_projection", self)
        texts = unit_rows(texts)  # [classes, prompts, features]
        classes, prompts, width = texts.shape
        seen = task.mean_view("features", self)
        means = unit_rows(class_means(seen, task.labels, classes).T)
        existing = one_hot(task.labels, classes).any(0)[:, None]
        match = jnp.where(existing, jnp.einsum("cpd,cd->cp", texts, means), 1.0)
        length = jnp.linalg.norm(match, axis=-1, keepdims=True)
        share = jax.nn.softmax(self.sharpness * match / length)
        guided = unit_rows(jnp.einsum("cp,cpd->cd", share, texts))
        best = jnp.argsort(-match)[..., None]
        taught = jnp.take_along_axis(texts * match[..., None], best, 1)
        labels = jnp.broadcast_to(jnp.arange(classes)[:, None], match.shape)
        if self.kept is not None:
            # More than there are repeats the best.
            taught = jnp.concatenate([taught, taught], 1)
            labels = jnp.where(
                jnp.arange(2 * prompts) < self.kept * prompts, jnp.arange(classes)[:, None], -1
            )
        features, of_features = task.every_view("features", self)
        kernel, bias = gaussian_classifier(
            jnp.concatenate([taught.reshape(-1, width), features]),
            jnp.concatenate([labels.reshape(-1), jnp.asarray(of_features)]),
            classes,
        )
        return State({"kernel": kernel, "bias": bias, "guided": guided}, None)

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        features, learnt = needed(inputs.features, "features", self), state.trained
        local = self.text * features @ learnt["guided"].T + features @ learnt["kernel"]
        return without_zero_shot(local + learnt["bias"], inputs.zero_shot)
