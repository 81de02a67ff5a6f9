from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from logitjax.heads import torch_linear
from logitjax.ops import Array


class MLPHead(nnx.Module):
    """The published nonlinear second head; its arguments are those of `DualHead`."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        hidden_features: int,
        dropout: float,
        axis_name: str | None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.hidden = torch_linear(in_features, hidden_features, dtype=dtype, rngs=rngs)
        # torch's defaults; its momentum of 0.1 is flax's 0.9.
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
        # Before the normalisation, as in the released code.
        if train and self.dropout and key is not None:
            kept = jax.random.bernoulli(key, 1.0 - self.dropout, hidden.shape)
            hidden = jnp.where(kept, hidden / (1.0 - self.dropout), 0.0)
        hidden = nnx.relu(self.norm(hidden, use_running_average=not train))
        return jnp.asarray(self.out(hidden), jnp.float32)


class DualHead(nnx.Module):
    """A head for the labels and a second one for the teacher, which only training uses.

    A call evaluates the first head alone, so a model with a dual head predicts like any other.
    `both` returns the logits of both heads; export `without_auxiliary()`.

    Args:
        auxiliary: `'linear'`, or `'mlp'` (see :class:`MLPHead`) for a teacher of another structure,
            with `hidden_features` and `dropout`.
        axis_name: mesh axis of the batch inside `shard_map` or `pmap`; not needed under `jit`.
        dtype: type of the computation; logits are float32.
        rngs: needs the stream `params`.

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
        """Logits of the second head; `key` seeds the MLP's dropout, which is off without it."""
        if isinstance(self.aux, MLPHead):
            return self.aux(features, train=train, key=key)
        return jnp.asarray(self.aux(jnp.asarray(features)), jnp.float32)

    def both(
        self, features: Float[Array, "*batch features"], **options: Any
    ) -> tuple[Float[jax.Array, "*batch classes"], Float[jax.Array, "*batch classes"]]:
        """Logits of the first and of the second head, with the options of `auxiliary`."""
        return self(features), self.auxiliary(features, **options)

    def without_auxiliary(self) -> nnx.Linear:
        """The first head, which is all that a trained model needs."""
        return self.fc
