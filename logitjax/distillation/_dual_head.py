"""Two heads on one backbone: one learns the labels, the other the teacher's logits."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from logitjax.distillation._binary_kl import binary_kl_norm
from logitjax.heads import torch_linear
from logitjax.losses import cross_entropy
from logitjax.ops import Array, checks


class MLPHead(nnx.Module):
    """The published nonlinear second head: linear, dropout, batch normalisation, ReLU, linear.

    Args:
        in_features: number of features of the backbone.
        num_classes: number of classes of the logits.
        hidden_features: in between.
        dropout: rate, before the normalisation (as in the released code).
        axis_name: mesh axis of the batch inside `shard_map` or `pmap`; not needed under `jit`.
        dtype: type of the computation.
        rngs: needs `params`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        hidden_features: int = 200,
        dropout: float = 0.1,
        axis_name: str | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.hidden = torch_linear(in_features, hidden_features, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(
            hidden_features, momentum=0.9, epsilon=1e-5, axis_name=axis_name, dtype=dtype, rngs=rngs
        )
        self.out = torch_linear(hidden_features, num_classes, dtype=dtype, rngs=rngs)
        self.dropout = dropout

    def __call__(
        self,
        features: Float[Array, "*batch features"],
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> Float[jax.Array, "*batch classes"]:
        hidden = self.hidden(jnp.asarray(features))
        if train and self.dropout and key is not None:
            kept = jax.random.bernoulli(key, 1.0 - self.dropout, hidden.shape)
            hidden = jnp.where(kept, hidden / (1.0 - self.dropout), 0.0)
        hidden = nnx.relu(self.norm(hidden, use_running_average=not train))
        return jnp.asarray(self.out(hidden), jnp.float32)


class DualHead(nnx.Module):
    """A head for the labels and a second one for the teacher, which only training uses.

    Called, it is the first head alone: a model that holds it predicts as any other. `both` gives
    the logits of the two; `without_auxiliary` is what to export.

    Args:
        in_features: number of features of the backbone.
        num_classes: number of classes of both heads.
        auxiliary: `'linear'`, or `'mlp'` (see :class:`MLPHead`) where teacher and student differ
            in structure.
        hidden_features: number of hidden features of the MLP.
        dropout: dropout rate of the MLP.
        axis_name: mesh axis of the batch inside `shard_map` or `pmap`; not needed under `jit`.
        dtype: type of the computation; logits are float32.
        rngs: needs `params`.

    Raises:
        ValueError: an unknown kind of auxiliary head.

    >>> head = DualHead(4, 10, rngs=nnx.Rngs(0))
    >>> [x.shape for x in nnx.jit(DualHead.both)(head, jnp.ones((2, 4)))]
    [(2, 10), (2, 10)]

    References:
        Yang et al., Dual-Head Knowledge Distillation (arXiv 2411.08937): linear on ImageNet, the
        MLP on CIFAR-100.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        auxiliary: Literal["linear", "mlp"] = "linear",
        hidden_features: int = 200,
        dropout: float = 0.1,
        axis_name: str | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if auxiliary not in ("linear", "mlp"):
            raise ValueError(f"auxiliary: expected 'linear' or 'mlp', got {auxiliary!r}")
        self.fc = torch_linear(in_features, num_classes, dtype=dtype, rngs=rngs)
        self.aux: Any = (
            torch_linear(in_features, num_classes, dtype=dtype, rngs=rngs)
            if auxiliary == "linear"
            else MLPHead(
                in_features,
                num_classes,
                hidden_features=hidden_features,
                dropout=dropout,
                axis_name=axis_name,
                dtype=dtype,
                rngs=rngs,
            )
        )

    def __call__(
        self, features: Float[Array, "*batch features"]
    ) -> Float[jax.Array, "*batch classes"]:
        return jnp.asarray(self.fc(jnp.asarray(features)), jnp.float32)

    def auxiliary(
        self,
        features: Float[Array, "*batch features"],
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> Float[jax.Array, "*batch classes"]:
        """The second head's logits; `key` draws the MLP's dropout, off without one."""
        if isinstance(self.aux, MLPHead):
            return self.aux(features, train=train, key=key)
        return jnp.asarray(self.aux(jnp.asarray(features)), jnp.float32)

    def both(
        self,
        features: Float[Array, "*batch features"],
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[Float[jax.Array, "*batch classes"], Float[jax.Array, "*batch classes"]]:
        """The logits of the first and of the second head."""
        return self(features), self.auxiliary(features, train=train, key=key)

    def without_auxiliary(self) -> nnx.Linear:
        """The first head: all that a trained model needs."""
        return self.fc


def dual_head_loss(
    features: Float[Array, "*batch features"],
    fc: Callable[[Any], Any],
    aux: Callable[[Any], Any],
    labels: Int[Array, "*batch"],
    teacher_logits: Float[Array, "*batch teacher"],
    *,
    teacher_head: Callable[[Any], Any] | None = None,
    alpha: float | Float[Array, ""] = 1.0,
    gamma: float | Float[Array, ""] = 1.0,
    loss: Callable[[Any, Any], Any] = binary_kl_norm,
    block_size: int | None = None,
) -> tuple[Float[jax.Array, "*batch"], dict[str, Float[jax.Array, "*batch"]]]:
    """Cross-entropy on one head plus a logit loss on the other, for any backbone.

    On a shared head the two losses conflict: cross-entropy wants margins without bound, a logit
    loss fixes the logits at the teacher's. Here they share only the features.

    For language models, whose logits are large, give a `block_size`, and the teacher's hidden
    states with its head in place of its logits. Blocks of positions are then computed one after
    another, forward and backward, so that the logits of one block exist at a time.

    ::

        gamma * CE(fc(h), y) + alpha * loss(aux(h), z_t)

    Args:
        features: `[*batch, features]` of the backbone.
        fc: features to logits, the head that predicts.
        aux: features to logits, the head for the teacher.
        labels: `[*batch]` classes; negative ones count 0 in the cross-entropy.
        teacher_logits: `[*batch, classes]`, or with `teacher_head` the teacher's features.
        teacher_head: the teacher's features to its logits.
        alpha: weight of the logit loss. Tune it: at 1 with a sum over classes it is an order of
            magnitude above the cross-entropy.
        gamma: weight of the cross-entropy.
        loss: `(student_logits, teacher_logits) -> [*batch]`, such as `binary_kl_norm` (published)
            or `binary_kl`, with options bound by `functools.partial`.
        block_size: positions (along the last batch axis) at a time. The heads must then act on each
            position by itself: no batch normalisation.

    Returns:
        The loss `[*batch]` and both parts unweighted, `cross_entropy` and `distillation`.

    Raises:
        TypeError: features or the teacher's are not floating point, or labels not integers.
        ValueError: shapes that do not fit, a block size below 1, or blocks of features without a
            batch axis.

    >>> head = lambda hidden: hidden @ jnp.ones((4, 3))
    >>> loss = jax.jit(dual_head_loss, static_argnums=(1, 2))
    >>> value, parts = loss(jnp.ones((2, 4)), head, head, jnp.array([0, 1]), jnp.ones((2, 3)))
    >>> value.shape, sorted(parts)
    ((2,), ['cross_entropy', 'distillation'])

    References:
        Yang et al. (arXiv 2411.08937). The released code has `gamma=1`, `alpha=1` on CIFAR-100
        and .1 on ImageNet, and no softmax distillation term.
    """
    checks.shapes(
        features=(features, "float *batch features"),
        labels=(labels, "int *batch"),
        teacher_logits=(teacher_logits, "float *batch teacher"),
    )
    features, labels = jnp.asarray(features), jnp.asarray(labels)
    teacher = jax.lax.stop_gradient(jnp.asarray(teacher_logits))

    def parts(features: jax.Array, labels: jax.Array, teacher: jax.Array) -> tuple[Any, Any]:
        known = labels >= 0
        task = cross_entropy(fc(features), jnp.where(known, labels, 0))
        if teacher_head is not None:
            teacher = jax.lax.stop_gradient(teacher_head(teacher))
        return jnp.where(known, task, 0.0), loss(aux(features), teacher)

    if block_size is None:
        task, distillation = parts(features, labels, teacher)
    else:
        task, distillation = _blocked(parts, features, labels, teacher, block_size)
    metrics = {"cross_entropy": task, "distillation": distillation}
    return gamma * task + alpha * distillation, metrics


def _blocked(
    parts: Callable[..., tuple[Any, Any]],
    features: jax.Array,
    labels: jax.Array,
    teacher: jax.Array,
    block_size: int,
) -> tuple[Any, Any]:
    """`parts` over blocks of the last batch axis; the others, perhaps sharded, stay whole."""
    if block_size < 1:
        raise ValueError(f"block_size: expected a positive number, got {block_size}")
    if features.ndim < 2:
        raise ValueError(f"features: expected a batch axis for blocks, got {features.shape}")
    axis = features.ndim - 2
    length = features.shape[axis]
    blocks = -(-length // block_size)

    def split(x: jax.Array, fill: int = 0) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * block_size - length)
        x = jnp.pad(x, padding, constant_values=fill)
        x = x.reshape(*x.shape[:axis], blocks, block_size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], blocks * block_size)[..., :length]

    inputs = (split(features), split(labels, -1), split(teacher))
    body = jax.checkpoint(lambda args: parts(*args), prevent_cse=False)
    task, distillation = jax.lax.map(body, inputs)
    return join(task), join(distillation)
