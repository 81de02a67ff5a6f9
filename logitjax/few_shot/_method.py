"""Few-shot logit bias: what its methods share.

All of them add something to the logits of a zero-shot classifier, learnt from a few labelled
images, and differ in the features, the predictor and the fusion of that something::

    s = s0 + beta * s_bias

Encoders are frozen, so a method sees features that were computed once.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.losses import cross_entropy
from logitjax.ops import Array, Number, checks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Cached images, the last axis being classes or features; absent ones are None.

    Attributes:
        zero_shot: `[*batch, classes]` logits of the zero-shot classifier.
        features: `[*batch, features]` of the encoder they come from, rows of length one.
        auxiliary: `[*batch, auxiliary]` of another encoder, rows of length one.
        weight: `[*batch, 1]`, filled in by :meth:`Method.prepare` where the fusion weight
            depends on the image alone.
    """

    zero_shot: Any
    features: Any = None
    auxiliary: Any = None
    weight: Any = None

    def __len__(self) -> int:
        return len(self.zero_shot)

    def __getitem__(self, rows: Any) -> "Inputs":
        return jax.tree.map(lambda x: x[rows], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotTask:
    """What a method learns from: labelled images, and weights of the zero-shot classifier.

    Attributes:
        support: `[views * n, ...]` labelled images, view after view of all of them.
        labels: `[n]` classes; images with the label -1 are not there.
        class_weights: `[features, classes]` of the zero-shot classifier, columns of length one; for
            methods that read them.
        views: Augmented views of every image.
    """

    support: Inputs
    labels: Any
    class_weights: Any = None
    views: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def num_classes(self) -> int:
        return self.support.zero_shot.shape[-1]

    def mean_view(self, name: str, method: Any) -> jax.Array:
        """`[n, features]` of the encoder `name`: means over views, of length one again.

        Raises:
            ValueError: The images have no such features; the error names who needs them.
        """
        features = needed(getattr(self.support, name), name, method)
        if self.views == 1:
            return features
        return unit_rows(features.reshape(self.views, -1, features.shape[-1]).mean(0))


class State(NamedTuple):
    """What a method has learnt (`trained`) and what it keeps fixed (`fixed`): pytrees."""

    trained: Any
    fixed: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method: how its bias starts, what it is, and what it is trained on.

    Fields that are numbers may be traced, so a grid of them is a `vmap` over
    `dataclasses.replace`.

    Attributes:
        beta: Factor of the bias.
    """

    beta: Number = 1.0

    # Whether gradient steps are to follow `init`.
    trains: ClassVar[bool] = True

    def init(self, task: FewShotTask, *, key: jax.Array | None = None) -> State:
        """The state before any gradient step; `key` is for methods that start at random."""
        raise NotImplementedError

    def prepare(self, inputs: Inputs) -> Inputs:
        """Computes, once, what depends on the images alone."""
        return inputs

    def bias(self, state: State, inputs: Inputs) -> jax.Array:
        """`s_bias`, `[*batch, classes]`."""
        raise NotImplementedError

    def logits(self, state: State, inputs: Inputs) -> jax.Array:
        """`s0 + beta * s_bias`, `[*batch, classes]`."""
        return checks.as_float(inputs.zero_shot, "zero_shot") + self.beta * self.bias(state, inputs)

    def loss(self, state: State, inputs: Inputs, labels: Any) -> jax.Array:
        """What a gradient step lowers, `[*batch]`: the cross-entropy of the fused logits."""
        return cross_entropy(self.logits(state, inputs), labels)


def unit_rows(values: Float[Array, "*batch features"]) -> Float[jax.Array, "*batch features"]:
    """Rows scaled to length one; a row of zeros stays.

    >>> unit_rows(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    Array([[0.6, 0.8],
           [0. , 0. ]], dtype=float32)
    """
    values = checks.as_float(values, "values")
    square = jnp.square(values).sum(-1, keepdims=True)
    return jnp.where(square > 0, values / jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def zero_shot_logits(
    features: Float[Array, "*batch features"],
    class_weights: Float[Array, "features classes"],
    *,
    scale: Number = 100.0,
) -> Float[jax.Array, "*batch classes"]:
    """Logits of a zero-shot classifier: scaled cosines of image and class.

    ::

        scale * (f / |f|) @ W0

    Args:
        features: `[*batch, features]` of the images, of any length.
        class_weights: `[features, classes]`: in CLIP the mean, over prompt templates, of a class's
            text features of length one, scaled to length one again.
        scale: 100, to which CLIP's learned scale was clipped; the published methods fix it.

    Returns:
        float32 `[*batch, classes]`.

    >>> zero_shot_logits(jnp.array([[3.0, 4.0]]), jnp.eye(2)).round(4)
    Array([[60., 80.]], dtype=float32)
    """
    weights = checks.as_float(class_weights, "class_weights")
    return jnp.multiply(scale, unit_rows(features) @ weights)


def z_score(logits: Float[Array, "*batch classes"]) -> Float[jax.Array, "*batch classes"]:
    """Logits with mean 0 and standard deviation 1 over the classes of each example.

    The scale of a linear predictor, and whatever all its classes share, then mean nothing. A row of
    equal logits becomes zeros and gets no gradient (the released code divides by 0 there). Of two
    classes it leaves the order alone, without a gradient.
    `distillation.standardize_logits` is the form for distillation, which adds to the deviation.

    ::

        (z - mean(z)) / std(z)        std divides by the number of classes - 1

    >>> z_score(jnp.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    Array([[-1.,  0.,  1.],
           [ 0.,  0.,  0.]], dtype=float32)
    """
    logits = checks.as_float(logits, "logits")
    deviation = logits - logits.mean(-1, keepdims=True)
    variance = jnp.square(deviation).sum(-1, keepdims=True) / max(logits.shape[-1] - 1, 1)
    inverse = jnp.where(variance > 0, jax.lax.rsqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return deviation * inverse


def class_means(
    features: Float[Array, "n features"], labels: Int[Array, " n"], num_classes: int
) -> Float[jax.Array, "features classes"]:
    """The mean feature of every class, as the columns of a linear predictor.

    A class without an example gets zeros; so do labels outside the classes.

    >>> class_means(jnp.array([[1.0], [3.0], [5.0]]), jnp.array([0, 0, 1]), 3)
    Array([[2., 5., 0.]], dtype=float32)
    """
    features = checks.as_float(features, "features")
    members = one_hot(labels, num_classes, features.dtype)
    return (features.T @ members) / jnp.maximum(members.sum(0), 1)


def one_hot(labels: Any, num_classes: int, dtype: Any = jnp.float32) -> jax.Array:
    """`[n, classes]`; rows of labels outside the classes are zero."""
    return (jnp.asarray(labels)[:, None] == jnp.arange(num_classes)).astype(dtype)


def needed(value: Any, name: str, method: Any) -> jax.Array:
    """`value`, or an error that says which method misses it."""
    if value is None:
        raise ValueError(f"{name}: {type(method).__name__} expects it, got None")
    return checks.as_float(value, name)
