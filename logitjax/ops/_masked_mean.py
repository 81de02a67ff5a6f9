from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from logitjax.ops import checks
from logitjax.ops._types import Array


def masked_mean(
    values: Float[Array, "..."], where: Bool[Array, "..."] | None = None
) -> Float[jax.Array, ""]:
    """Mean of `values` over the positions where `where` is True.

    Values outside the mask may be infinite or nan: they affect neither mean nor gradient. ::

        sum_i where_i values_i / max(1, sum_i where_i)

    Args:
        values: any shape, such as the unreduced losses `[batch, length]`.
        where: boolean, broadcastable to `values`; all positions when None.

    Returns:
        A scalar, float32; 0 for an empty mask.

    Raises:
        TypeError: `where` is not boolean.
        ValueError: `where` does not broadcast to `values`.

    >>> import numpy as np
    >>> mean = jax.jit(masked_mean)
    >>> float(mean(np.array([1.0, np.inf, 4.0]), np.array([True, False, True])))
    2.5
    """
    values = jnp.asarray(values)
    # In bf16 a sum of ones stops at 256.
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    checks.where(where, values.shape)
    where = jnp.broadcast_to(True if where is None else where, values.shape)
    # Selected, not multiplied: 0 times inf is nan.
    total = jnp.where(where, values, 0.0).sum()
    return total / jnp.maximum(where.sum(), 1)


def gradient_where(
    values: Float[Array, "..."], where: Bool[Array, "..."]
) -> Float[jax.Array, "..."]:
    """The values unchanged, with a derivative of zero where `where` is False.

    A loss that masks its result still multiplies a cotangent of zero by the derivative at each
    masked position. Where that derivative is infinite or nan, the product is nan. This function
    prevents it. It costs one select in the backward pass and nothing in the forward pass.

    Args:
        values: `[*batch, ...]`, with any number of axes after those of `where`.
        where: `[*batch]` boolean.

    Raises:
        TypeError: `where` is not boolean.
        ValueError: the axes of `where` are not the first ones of `values`.

    >>> import numpy as np
    >>> def loss(x, where):
    ...     return masked_mean(jnp.sqrt(gradient_where(x, where)), where)
    >>> jax.jit(jax.grad(loss))(np.array([4.0, 0.0]), np.array([True, False]))
    Array([0.25, 0.  ], dtype=float32)
    """
    values, where = jnp.asarray(values), jnp.asarray(where)
    checks.where(where, values.shape[: where.ndim])
    if where.shape != values.shape[: where.ndim]:
        raise ValueError(f"where: expected {values.shape[: where.ndim]}, got {where.shape}")
    return _gradient_where(values, where)


@jax.custom_jvp
def _gradient_where(values: jax.Array, where: jax.Array) -> jax.Array:
    # Only the derivative differs.
    return values


@_gradient_where.defjvp
def _gradient_where_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (values, where), (tangent, _) = primals, tangents
    along = jnp.reshape(where, where.shape + (1,) * (values.ndim - where.ndim))
    return _gradient_where(values, where), jnp.where(along, tangent, jnp.zeros((), tangent.dtype))
