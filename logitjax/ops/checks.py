"""Argument checks at trace time: each error names the argument, what was expected and what came."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.ops._types import Array


def as_float(
    values: Array, name: str, vocab_where: Array | None = None, where_name: str = "vocab_where"
) -> jax.Array:
    """Returns `values` in float32 (float64 stays where x64 is on); integers are a TypeError.

    Of logits, those that `vocab_where` excludes are `-inf`.
    """
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floating point, got {values.dtype}")
    if values.ndim == 0:
        raise ValueError(f"{name}: expected a vocabulary axis, got a scalar")
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if vocab_where is None:
        return values
    where(vocab_where, values.shape, where_name)
    return jnp.where(vocab_where, values, -jnp.inf)


def axis(axis: int, shape: tuple[int, ...], name: str) -> int:
    """Returns `axis` counted from the front; there has to be something along it."""
    ndim = len(shape)
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis: expected one of the {ndim} axes of {name}, got {axis}")
    if not shape[axis]:
        raise ValueError(f"{name}: expected at least one entry along axis {axis}, got {shape}")
    return axis % ndim


def same_shape(first: Array, second: Array, first_name: str, second_name: str) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{second_name}: expected the shape of {first_name}, {first.shape}, got {second.shape}"
        )


def where(mask: Array | None, shape: tuple[int, ...], name: str = "where") -> None:
    """Checks that a boolean mask broadcasts to `shape`."""
    if mask is None:
        return
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{name}: expected booleans, got {mask.dtype}")
    try:
        matches = jnp.broadcast_shapes(mask.shape, shape) == tuple(shape)
    except ValueError:
        matches = False
    if not matches:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(shape)}, got {mask.shape}"
        )


def positive(value: Any, name: str) -> None:
    """Checks a Python number; a traced one cannot be looked at and passes."""
    if isinstance(value, (int, float, np.number)) and not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def between(value: Any, low: float | int, high: float | int, name: str) -> None:
    """Checks a Python number; a traced one cannot be looked at and passes."""
    if isinstance(value, (int, float, np.number)) and not low <= value <= high:
        raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}")


def vocabulary_unsharded(values: jax.Array, name: str, operation: str) -> None:
    """Raises when the last axis of `values` is sharded over an Explicit mesh axis."""
    spec = jax.typeof(values).sharding.spec
    if len(spec) == values.ndim and values.ndim and spec[-1] is not None:
        raise ValueError(
            f"{name} is sharded over {spec[-1]!r} along its vocabulary: a {operation} needs "
            f"axis_name={spec[-1]!r} inside jax.shard_map, or an unsharded vocabulary"
        )
