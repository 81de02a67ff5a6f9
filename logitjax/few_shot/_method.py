"""The interface of few-shot methods: logits `s = s0 + beta * s_bias` of frozen encoders."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from logitjax.losses import cross_entropy
from logitjax.ops import Array, Number, checks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Cached features of images. The last axis is classes or features; absent ones are None.

    Attributes:
        zero_shot: `[*batch, classes]` logits of the zero-shot classifier.
        features: `[*batch, features]` of the encoder of these logits, rows of length one.
        auxiliary: `[*batch, auxiliary]` of another encoder, rows of length one.
        hidden: `[*batch, hidden]` of the first encoder before its last projection, of any length.
    """

    zero_shot: Any
    features: Any = None
    auxiliary: Any = None
    hidden: Any = None

    @classmethod
    def of(
        cls,
        features: Float[Array, "*batch features"],
        class_weights: Float[Array, "features classes"],
        *,
        scale: Number = 100.0,
        auxiliary: Float[Array, "*batch auxiliary"] | None = None,
        hidden: Any = None,
    ) -> "Inputs":
        """Features of any length, with the logits of a zero-shot classifier: scaled cosines.

        `scale * (f / |f|) @ W0`

        Args:
            class_weights: `[features, classes]`: in CLIP the mean, over prompt templates, of a
                class's text features of length one, scaled to length one again.
            scale: Scale of the cosines: 100, the upper limit of CLIP's learned scale, as published.
            features, auxiliary, hidden: As in `Inputs`, of any length.

        >>> logits = Inputs.of(jnp.array([[3.0, 4.0]]), jnp.eye(2)).zero_shot
        >>> [f"{logit:.2f}" for logit in logits.ravel().tolist()]
        ['60.00', '80.00']
        """
        checks.shapes(
            features=(features, "float *batch features"),
            class_weights=(class_weights, "float features classes"),
        )
        weights, features = checks.as_float(class_weights, "class_weights"), unit_rows(features)
        return cls(
            zero_shot=jnp.multiply(scale, features @ weights),
            features=features,
            auxiliary=None if auxiliary is None else unit_rows(auxiliary),
            hidden=hidden,
        )

    def __len__(self) -> int:
        return len(self.zero_shot)

    def __getitem__(self, rows: Any) -> "Inputs":
        # Absent arrays are not leaves.
        return jax.tree.map(lambda x: x[rows], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotTask:
    """Labelled images to learn from, and the zero-shot classifier's weights.

    Attributes:
        support: `[views * n, ...]` labelled images, one view of all of them after another.
        labels: `[n]` classes; images with the label -1 are padding.
        class_weights: `[features, classes]` of the zero-shot classifier, columns of length one; for
            methods that read them. `methods.CLAP` takes columns of any length.
        projection: `[hidden, features]`, the encoder's last projection; for methods that train it.
        projection_bias: `[features]`, the projection's bias; None for none.
        texts: `[classes, prompts, width]`, the text features of every prompt of a class, before
            `text_projection` `[width, features]` if that is given.
        views: Augmented views of every image.
    """

    support: Inputs
    labels: Any
    class_weights: Any = None
    projection: Any = None
    projection_bias: Any = None
    texts: Any = None
    text_projection: Any = None
    views: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def num_classes(self) -> int:
        return self.support.zero_shot.shape[-1]

    @property
    def shots(self) -> jax.Array:
        """Labelled images per class, on average over the classes that have some."""
        hit = one_hot(self.labels, self.num_classes).sum(0)
        return hit.sum() / jnp.maximum((hit > 0).sum(), 1)

    def check(self) -> None:
        """Refuse labels that do not fit the images or the classes, or the absence of labels.

        TypeError for labels that are not integers, otherwise ValueError: not one label per image, a
        label that is neither a class nor -1, or no image.
        """
        images, labels = np.shape(self.support.zero_shot)[:-1], np.shape(self.labels)
        count = labels[-1] if labels else 0
        if not labels or images != (*labels[:-1], self.views * count):
            raise ValueError(
                f"labels: expected one for each of {images} images in {self.views} views, "
                f"got shape {labels}"
            )
        if not count:
            raise ValueError("labels: expected at least one labelled image, got none")
        array = self.labels if hasattr(self.labels, "dtype") else np.asarray(self.labels)
        checks.ids(array, self.num_classes, "labels", least=-1)

    def mean_view(self, name: str, method: Any) -> jax.Array:
        """Features `[n, features]` of the encoder `name`: means over views, of length one again.

        ValueError if the images lack such features (it names the method), or as for `check`.
        """
        self.check()
        features = needed(getattr(self.support, name), name, method)
        if self.views == 1:
            return features
        return unit_rows(features.reshape(self.views, -1, features.shape[-1]).mean(0))

    def every_view(self, name: str, method: Any) -> tuple[jax.Array, Any]:
        """Features `[views * n, features]` of the encoder `name`, and labels, as `mean_view`."""
        self.check()
        labels = self.labels
        if self.views > 1:
            labels = jnp.tile(jnp.asarray(labels), self.views)
        return needed(getattr(self.support, name), name, method), labels


# Fields of a task that do not describe images.
CLASSIFIER = ("class_weights", "projection", "projection_bias", "texts", "text_projection")


class State(NamedTuple):
    """The state of a method: learned arrays (`trained`) and fixed ones (`fixed`), as pytrees."""

    trained: Any
    fixed: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A few-shot method: the initial state, the bias and the loss.

    Numeric fields, such as `beta`, the factor of the bias, may be traced: a grid over them is a
    `vmap` over `dataclasses.replace`.
    """

    beta: Number = 1.0

    # Whether gradient steps follow `init`.
    trains: ClassVar[bool] = True
    # Inputs besides the features of the zero-shot encoder, by the names of `Pictures`.
    needs: ClassVar[tuple[str, ...]] = ()

    def at_scale(self, scale: float) -> "Method":
        """The method for zero-shot logits that are cosines of this scale."""
        named = {field.name for field in dataclasses.fields(self)}
        return dataclasses.replace(self, scale=scale) if "scale" in named else self

    def check(self, task: FewShotTask) -> None:
        """Refuse, outside `jit`, images unsuitable for learning; by default as the task does.

        TypeError for labels that are not integers, ValueError for unusable images.
        """
        task.check()

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        """The state before any gradient step; `key` is for methods with a random initialisation."""
        raise NotImplementedError

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        """`s_bias`, `[*batch, classes]`."""
        raise NotImplementedError

    def logits(self, state: State, inputs: Inputs) -> jax.Array:
        """`s0 + beta * s_bias`, `[*batch, classes]`."""
        return checks.as_float(inputs.zero_shot, "zero_shot") + self.beta * self.bias(state, inputs)

    def loss(self, state: State, inputs: Inputs, labels: Any) -> jax.Array:
        """The training loss, `[*batch]`: the cross-entropy of the fused logits."""
        return cross_entropy(self.logits(state, inputs), labels)


# One program if called outside `jit`, where each operation would otherwise be one.
@jax.jit
def unit_rows(values: Float[Array, "*batch features"]) -> Float[jax.Array, "*batch features"]:
    """Rows scaled to length one; a row of zeros is unchanged."""
    checks.shapes(values=(values, "float *batch features"))
    values = checks.as_float(values, "values")
    # Squares of 1e-25 vanish in float32, and those of 1e25 overflow.
    size = jax.lax.stop_gradient(jnp.abs(values).max(-1, keepdims=True))
    # Not `size > 0`: a row with a nan must stay nan.
    none = size == 0
    values = values / jnp.where(none, 1.0, size)
    return values / jnp.sqrt(jnp.where(none, 1.0, jnp.square(values).sum(-1, keepdims=True)))


def z_score(logits: Float[Array, "*batch classes"]) -> Float[jax.Array, "*batch classes"]:
    """Logits with mean 0 and standard deviation 1 over the classes of each example.

    ``(z - mean(z)) / std(z)``, std over the number of classes - 1. A row of equal logits becomes
    zeros and gets no gradient (the released code divides by 0 there). A class at `-inf` is absent,
    and becomes 0. (`distillation.standardize_logits` adds to the deviation.)
    """
    logits = checks.as_float(logits, "logits")
    deviation, present = logits, logits != -jnp.inf
    count = present.sum(-1, keepdims=True)
    # The first mean has rounding errors.
    for _ in range(2):
        deviation = jnp.where(present, deviation, 0.0)
        mean = deviation.sum(-1, keepdims=True) / jnp.maximum(count, 1)
        deviation = jnp.where(present, deviation - mean, 0.0)
    variance = jnp.square(deviation).sum(-1, keepdims=True) / jnp.maximum(count - 1, 1)
    flat = variance == 0
    # The inner one keeps nan out of gradients.
    return deviation * jnp.where(flat, 0.0, jax.lax.rsqrt(jnp.where(flat, 1.0, variance)))


def without_zero_shot(logits: jax.Array, zero_shot: Array) -> jax.Array:
    """The bias from zero-shot logits to `logits`; 0 for a class at `-inf`, which stays."""
    present = jnp.asarray(zero_shot) != -jnp.inf
    return jnp.where(present, logits - jnp.where(present, zero_shot, 0.0), 0.0)


def class_means(
    features: Float[Array, "n features"], labels: Int[Array, " n"], num_classes: int
) -> Float[jax.Array, "features classes"]:
    """Mean features of classes, as columns of a linear predictor; zeros without an example."""
    features = checks.as_float(features, "features")
    labels = jnp.asarray(labels)
    # A product with one-hot labels costs a factor of the number of classes: 65 GFLOP on ImageNet.
    row = jnp.where(labels < 0, num_classes, labels)
    sums, counts = (
        jax.ops.segment_sum(x, row, num_classes) for x in (features, jnp.ones_like(features[:, 0]))
    )
    return (sums / jnp.maximum(counts, 1)[:, None]).T


def one_hot(labels: Any, num_classes: int, dtype: Any = jnp.float32) -> jax.Array:
    """One-hot labels `[n, classes]`; rows of labels outside the classes are zero."""
    return (jnp.asarray(labels)[:, None] == jnp.arange(num_classes)).astype(dtype)


def needed(value: Any, name: str, method: Any) -> jax.Array:
    """Return `value`, with rows of length one for features; an error names the method."""
    if value is None:
        raise ValueError(f"{name}: expected an array for {type(method).__name__}, got None")
    result = checks.as_float(value, name)
    if name in ("features", "auxiliary"):
        # Tip-Adapter's cosines are exponents: for longer rows all would be nan.
        checks.unit_rows(value, name)
    return result
