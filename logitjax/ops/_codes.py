"""Matrices in 8 or 4 bits, and products with them without a wide copy where that is slow."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Group size of a scale of 4 bits, as in llama.cpp's Q4_0.
_GROUP = 32
_BITS = {"int8": jnp.int8, "int4": jnp.int4}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """A matrix of whole numbers with scales: one per row for int8, one per group of 32 for int4.

    ::

        matrix[o, i] = values[o, i] * scales[o, group(i)]

    Attributes:
        values: int8 or int4 `[outer, inner]`; products contract `inner`.
        scales: float32 `[outer, groups]`.
        outer_axis: axis of `outer` in the original matrix.

    >>> import numpy as np
    >>> codes = Codes.of(np.float32([[1.0, -1.0], [0.5, 0.5]]), "int8")
    >>> codes.product(jnp.array([[1.0, 2.0]])).round(2)
    Array([[-1. ,  1.5]], dtype=float32)
    """

    values: Any
    scales: Any
    outer_axis: int = dataclasses.field(default=0, metadata={"static": True})

    @classmethod
    def of(cls, matrix: Any, bits: str, *, outer_axis: int = 0) -> "Codes":
        """The nearest codes of a matrix, or of several along leading axes.

        Args:
            bits: `"int8"` or `"int4"`, otherwise ValueError.
        """
        if bits not in _BITS:
            raise ValueError(f"bits: expected one of {', '.join(_BITS)}, got {bits!r}")
        wide = jnp.asarray(matrix, jnp.float32)
        wide = wide if outer_axis == 0 else jnp.swapaxes(wide, -1, -2)
        inner = wide.shape[-1]
        # A width that groups do not divide has one scale per row.
        size = _GROUP if bits == "int4" and inner % _GROUP == 0 else inner
        groups = wide.reshape(*wide.shape[:-1], -1, size)
        largest = jnp.take_along_axis(groups, jnp.abs(groups).argmax(-1)[..., None], -1)
        # With four bits, -8 goes one further than 7: the extreme value takes it, whatever its sign.
        scales = jnp.abs(largest) / 127 if bits == "int8" else largest / -8
        scales = jnp.where(scales == 0, 1.0, scales)
        least, most = (-127, 127) if bits == "int8" else (-8, 7)
        values = jnp.clip(jnp.round(groups / scales), least, most).astype(_BITS[bits])
        return cls(values.reshape(wide.shape), scales[..., 0], outer_axis)

    # Variables of flax are read by `[...]`.
    def __getitem__(self, index: Any) -> "Codes":
        return self if index is Ellipsis else jax.tree.map(lambda leaf: leaf[index], self)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def nbytes(self) -> float:
        return self.size * (0.5 if self.dtype == jnp.int4 else 1) + self.scales.nbytes

    def rows(self, ids: jax.Array) -> jax.Array:
        """float32 rows `[*ids, inner]`."""
        return _scaled(jnp.take(self.values, ids, axis=0), jnp.take(self.scales, ids, axis=0))

    def dense(self) -> jax.Array:
        """The float32 matrix that the codes represent."""
        wide = _scaled(self.values, self.scales)
        return wide if self.outer_axis == 0 else jnp.swapaxes(wide, -1, -2)

    def again(self, matrix: jax.Array) -> "Codes":
        """Codes of another matrix, of the same kind."""
        return Codes.of(matrix, str(self.dtype), outer_axis=self.outer_axis)

    def product(self, x: jax.Array) -> jax.Array:
        """float32 `x @ matrix`, `[*batch, inner]` to `[*batch, outer]`, for float `x`."""
        x = jnp.asarray(x)
        rows = x.reshape(-1, x.shape[-1])
        if self.scales.shape[-1] > 1:
            out = _contract(rows.astype(jnp.float32), _scaled(self.values, self.scales))
        else:
            by = {"cpu": _exact_on_cpu, "default": _contract_as}
            out = lax.platform_dependent(rows, self.values, **by) * self.scales[:, 0]
        return out.reshape(*x.shape[:-1], -1)


def _scaled(values: jax.Array, scales: jax.Array) -> jax.Array:
    # To float32 first: XLA's CPU compiler miscompiles a fused subtraction or sum of int8.
    groups = values.astype(jnp.float32).reshape(*scales.shape, -1)
    return (groups * scales[..., None]).reshape(values.shape)


def _contract(x: jax.Array, y: jax.Array, kind: Any = jnp.float32) -> jax.Array:
    return lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=kind)


def _contract_as(x: jax.Array, values: jax.Array) -> jax.Array:
    # Accelerators' compilers fuse the conversion into the product.
    return _contract(x, values.astype(x.dtype))


@jax.custom_jvp
def _exact_on_cpu(x: jax.Array, values: jax.Array) -> jax.Array:
    """Split each row into two of int8, its codes and their remainder: 15 bits of precision.

    On XLA's CPU, a product of one int8 row is 17 times slower than of two, and a product with
    values converted to floats first writes all of them.
    """
    wide = x.astype(jnp.float32)
    step = jnp.maximum(jnp.abs(wide).max(axis=-1, keepdims=True), 1e-30) / 127
    rounded = jnp.round(wide / step)
    # The remainder is at most half a step, so 254 of its own.
    rest = jnp.round((wide / step - rounded) * 254)
    both = jnp.concatenate([rounded, rest]).astype(jnp.int8)
    top, low = jnp.split(_contract(both, values, jnp.int32).astype(jnp.float32), 2)
    return (top + low / 254) * step


@_exact_on_cpu.defjvp
def _linear(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # Rounding has no derivative: this is that of the product, which is linear.
    x, values = primals
    return _exact_on_cpu(x, values), _contract_as(tangents[0].astype(jnp.float32), values)
