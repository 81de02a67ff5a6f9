"""Products in bfloat16 on a CPU, where XLA only has fast ones that end in float32."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType

from logitjax import ops


def use_cpu_products(model: nnx.Module) -> None:
    """Make linear layers multiply with `dot_general`, in place; for bfloat16 on a CPU."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            module.dot_general = dot_general


def dot_general(
    lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, **options: Any
) -> jax.Array:
    """`jax.lax.dot_general`, faster for `[*batch, inner]` and `[inner, outer]` in bfloat16.

    XLA's CPU compiler has bfloat16 instructions (AMX, AVX512-BF16) only for products that end in
    float32: one of these is used and then rounded. It has no forward mode.
    """
    plain = dimension_numbers == (((lhs.ndim - 1,), (0,)), ((), ())) and rhs.ndim == 2
    narrow = lhs.dtype == rhs.dtype == jnp.bfloat16
    has_options = any(value is not None for value in options.values())
    # There JAX itself derives the sharding of a derivative, which a rule would have to state.
    explicit = AxisType.Explicit in jax.typeof(lhs).sharding.mesh.axis_types
    if not (plain and narrow) or has_options or explicit:
        return lax.dot_general(lhs, rhs, dimension_numbers, **options)
    # In `shard_map` both sides of the rule's derivative vary if either does.
    axes = ops.mesh.varying_axes(lhs) | ops.mesh.varying_axes(rhs)
    lhs, rhs = (ops.mesh.vary(side, sorted(axes)) for side in (lhs, rhs))
    if math.prod(lhs.shape[:-1]) != 1:
        return _product(lhs, rhs)
    # The product of a single row is slow too, that of two is not.
    row = lhs.reshape(1, -1)
    return _product(jnp.concatenate([row, row]), rhs)[0].reshape(*lhs.shape[:-1], -1)


@jax.custom_vjp
def _product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return _contract(lhs, rhs, (lhs.ndim - 1,), (0,))


def _contract(a: jax.Array, b: jax.Array, a_dims: tuple[int, ...], b_dims: tuple[int, ...]) -> Any:
    dims = ((a_dims, b_dims), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32).astype(a.dtype)


def _forward(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, Any]:
    return _product(lhs, rhs), (lhs, rhs)


def _backward(arrays: Any, bar: jax.Array) -> tuple[jax.Array, jax.Array]:
    lhs, rhs = arrays
    rows = tuple(range(lhs.ndim - 1))
    return _contract(bar, rhs, (bar.ndim - 1,), (1,)), _contract(lhs, bar, rows, rows)


_product.defvjp(_forward, _backward)
