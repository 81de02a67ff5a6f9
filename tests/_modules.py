"""Helpers for tests of any flax module."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from tests._compiled import compiled

Model = TypeVar("Model", bound=nnx.Module)


def num_params(model: nnx.Module) -> int:
    """Trainable numbers: running statistics are not among them."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def with_weights(make: Callable[[], Model], *, seed: int = 0, size: float = 0.02) -> Model:
    """The module of `make`, with normal numbers from numpy, ones for scales and zeros for biases.

    Initialisers compile programs for every shape; this needs none.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "scale" in name or "bias" in name:
            values = np.full(leaf.shape, "scale" in name)
        else:
            values = size * rng.normal(size=leaf.shape)
        return jax.device_put(values.astype(leaf.dtype))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


def call(model: nnx.Module, *arguments: Any, method: str = "__call__", **options: Any) -> Any:
    """A module called as one program, whose changes to its state are dropped."""
    return _call(*nnx.split(model), method, arguments, options)


@compiled
def _call(graphdef, state, method, arguments, options):
    return getattr(nnx.merge(graphdef, state), method)(*arguments, **options)
