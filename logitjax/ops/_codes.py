"""Matrices in 8 or 4 bits, and products with them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from logitjax.kernels import native

# Of a scale, as in llama.cpp's Q8_0 and Q4_0.
_GROUP = 32
# Rows up to which the kernel is faster than a product with a wide copy.
_FEW = 16
_BITS = {"int8": jnp.int8, "int4": jnp.int4}
# Of these scales of 8 bits, the one of least error is kept: weights that a file had in 5 or 6 bits
# are often met exactly. With 4 bits it made a small model worse.
_WIDER = np.float32(127 / np.arange(126, 95, -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """A matrix as whole numbers times scales, one for each 32 numbers of a row.

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
        """Codes of a matrix, or of several along leading axes.

        Args:
            bits: `"int8"` or `"int4"`, otherwise ValueError.
        """
        if bits not in _BITS:
            raise ValueError(f"bits: expected one of {', '.join(_BITS)}, got {bits!r}")
        wide = jnp.asarray(matrix, jnp.float32)
        wide = wide if outer_axis == 0 else jnp.swapaxes(wide, -1, -2)
        inner = wide.shape[-1]
        # A width that groups do not divide has one scale a row.
        size = _GROUP if inner % _GROUP == 0 else inner
        groups = wide.reshape(*wide.shape[:-1], -1, size)
        largest = jnp.take_along_axis(groups, jnp.abs(groups).argmax(-1)[..., None], -1)
        # Of four bits -8 is one more than 7: the extreme takes it, whatever its sign.
        first = jnp.abs(largest) / 127 if bits == "int8" else largest / -8
        first = jnp.where(first == 0, 1.0, first)
        least, most = (-127, 127) if bits == "int8" else (-8, 7)

        def error(scales: jax.Array) -> jax.Array:
            coded = jnp.clip(jnp.round(groups / scales), least, most) * scales
            return ((coded - groups) ** 2).sum(-1, keepdims=True)

        def better(scales: jax.Array, factor: jax.Array) -> tuple[jax.Array, None]:
            other = first * factor
            return jnp.where(error(other) < error(scales), other, scales), None

        scales = lax.scan(better, first, jnp.asarray(_WIDER))[0] if bits == "int8" else first
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
        """float32 `x @ matrix`, `[*batch, inner]` to `[*batch, outer]`."""
        x = jnp.asarray(x)
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        few = rows.shape[0] <= _FEW and self.dtype == jnp.int8
        out = (_few_products if few else _products)(rows, self.values, self.scales)
        return out.reshape(*x.shape[:-1], self.values.shape[0])


def _scaled(values: jax.Array, scales: jax.Array) -> jax.Array:
    # To float32 first: XLA's CPU compiler miscompiles a fused subtraction or sum of int8.
    groups = values.astype(jnp.float32).reshape(*scales.shape, -1)
    return (groups * scales[..., None]).reshape(values.shape)


def _products(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    return lax.dot_general(x, _scaled(values, scales), (((1,), (1,)), ((), ())))


@jax.custom_jvp
def _few_products(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    return native.on_cpu(native.code_products, _products, x, values, scales)


@_few_products.defjvp
def _linear(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # XLA does not look into the kernel.
    return _few_products(*primals), _products(tangents[0], *primals[1:])
