"""Matrices in 8 or 4 bits, and products with them."""

import dataclasses
from collections.abc import Mapping
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
# Least and most of the numbers. Of four bits -8 is one more than 7: the extreme takes it.
_LIMITS = {"int8": (-127, 127), "int4": (-8, 7)}
# Of these scales of 8 bits, the one of least error is kept: weights that a file had in 5 or 6 bits
# are often met exactly. With 4 bits it made a small model worse.
_WIDER = np.float32(127 / np.arange(126, 95, -1))
# Of scales with an offset: what lies outside is clipped, so that the rest has finer steps.
_NARROWER = np.linspace(0.95, 0.6, 8, dtype=np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """A matrix as whole numbers times scales, one for each group of numbers of a row.

    ::

        matrix[o, i] = values[o, i] * scales[o, group(i)] + offsets[o, group(i)]

    Attributes:
        values: int8, int4 or uint4 `[outer, inner]`; products contract `inner`.
        scales: float32, or 16 bits where they suffice, `[outer, groups]`.
        offsets: `[outer, groups]` of the same type; None for none.
        outer_axis: axis of `outer` in the original matrix.

    >>> import numpy as np
    >>> codes = Codes.of(np.float32([[1.0, -1.0], [0.5, 0.5]]), "int8")
    >>> codes.product(jnp.array([[1.0, 2.0]])).round(2)
    Array([[-1. ,  1.5]], dtype=float32)
    """

    values: Any
    scales: Any
    offsets: Any = None
    outer_axis: int = dataclasses.field(default=0, metadata={"static": True})

    @classmethod
    def of(
        cls,
        matrix: Any,
        bits: str,
        *,
        outer_axis: int = 0,
        group_size: int = _GROUP,
        asymmetric: bool = False,
        cov: Any = None,
    ) -> "Codes":
        """Codes of a matrix, or of several along leading axes.

        Args:
            bits: `"int8"` or `"int4"`, otherwise ValueError.
            group_size: numbers of a scale; one scale a row if it does not divide the width.
            asymmetric: whether groups have offsets; these and scales are then bfloat16.
            cov: `[inner, inner]`, covariance of the vectors of products, for one matrix. Columns
                are then rounded in turn, and the error of each is spread over later ones so that
                the products' errors have little variance (GPTQ, arXiv:2210.17323).
        """
        if bits not in _LIMITS:
            raise ValueError(f"bits: expected one of {', '.join(_LIMITS)}, got {bits!r}")
        wide = jnp.asarray(matrix, jnp.float32)
        wide = wide if outer_axis == 0 else jnp.swapaxes(wide, -1, -2)
        inner = wide.shape[-1]
        size = group_size if inner % group_size == 0 else inner
        if cov is not None:
            values, steps = _rounded_in_turn(wide, jnp.asarray(cov), bits, size, asymmetric)
        else:
            groups = wide.reshape(*wide.shape[:-1], -1, size)
            steps = _steps(groups, bits, asymmetric)
            values = _nearest(groups, *steps, bits)
        values = values.reshape(wide.shape).astype(bits)
        dtype = jnp.bfloat16 if asymmetric else jnp.float32
        scales, offsets = (None if x is None else x[..., 0].astype(dtype) for x in steps)
        return cls(values, scales, offsets, outer_axis)

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
        steps = jax.tree.leaves((self.scales, self.offsets))
        bytes_each = 1 if self.dtype == jnp.int8 else 0.5
        return self.size * bytes_each + sum(x.size * x.dtype.itemsize for x in steps)

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays for a file, by name; two values of four bits share a byte."""
        named = {"values": self.values, "scales": self.scales, "offsets": self.offsets}
        out = {name: np.asarray(x) for name, x in named.items() if x is not None}
        if self.dtype == jnp.int4:
            # Offset by 8, the even columns in the low halves.
            halves = (out["values"].astype(np.int8) + 8).astype(np.uint8)
            halves = np.pad(halves, ((0, 0), (0, halves.shape[1] % 2)))
            out["values"] = halves[:, ::2] | halves[:, 1::2] << 4
        return out

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], bits: str, inner: int, *, outer_axis: int = 0
    ) -> "Codes":
        """The codes of `arrays`, `inner` numbers wide."""
        values = arrays["values"]
        if bits == "int4":
            values = np.stack([values & 15, values >> 4], -1).reshape(len(values), -1)[:, :inner]
            values = values.astype(np.int8) - 8
        offsets = jnp.asarray(arrays["offsets"]) if "offsets" in arrays else None
        scales = jnp.asarray(arrays["scales"])
        return cls(jnp.asarray(values).astype(bits), scales, offsets, outer_axis)

    def rows(self, ids: jax.Array) -> jax.Array:
        """float32 rows `[*ids, inner]`."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, ids, axis=0), self)._wide()

    def _wide(self, dtype: Any = jnp.float32) -> jax.Array:
        # To floats first: XLA's CPU compiler miscompiles a fused subtraction or sum of int8.
        groups = self.values.astype(dtype).reshape(*self.scales.shape, -1)
        steps = self.scales, self.offsets
        scales, offsets = (None if x is None else x[..., None].astype(dtype) for x in steps)
        return _value(groups, scales, offsets).reshape(self.values.shape)

    def dense(self) -> jax.Array:
        """The float32 matrix that the codes represent."""
        wide = self._wide()
        return wide if self.outer_axis == 0 else jnp.swapaxes(wide, -1, -2)

    def again(self, matrix: jax.Array) -> "Codes":
        """Codes of another matrix, of the same kind."""
        size = self.values.shape[-1] // self.scales.shape[-1]
        asymmetric = self.offsets is not None
        kind: Any = dict(group_size=size, asymmetric=asymmetric, outer_axis=self.outer_axis)
        return Codes.of(matrix, "int8" if self.dtype == jnp.int8 else "int4", **kind)

    def product(self, x: jax.Array) -> jax.Array:
        """float32 `x @ matrix`, `[*batch, inner]` to `[*batch, outer]`."""
        x = jnp.asarray(x)
        # A TPU joins to a product what widens codes to bfloat16: it reads the codes alone.
        small = x.dtype == self.scales.dtype == jnp.bfloat16
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.bfloat16 if small else jnp.float32)
        # Two values of four bits share a byte.
        whole = self.dtype == jnp.int8 or self.values.shape[-1] // self.scales.shape[-1] % 2 == 0
        few = rows.shape[0] <= _FEW and whole and not small
        out = (_few_products if few else _products)(rows, self)
        return out.reshape(*x.shape[:-1], self.values.shape[0])


def _steps(groups: jax.Array, bits: str, asymmetric: bool) -> tuple[jax.Array, jax.Array | None]:
    """Scales and offsets `[..., groups, 1]` of groups `[..., groups, size]`."""
    least, most = _LIMITS[bits]
    if asymmetric:
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        first, factors = (high - low) / (most - least), _NARROWER
    else:
        largest = jnp.take_along_axis(groups, jnp.abs(groups).argmax(-1)[..., None], -1)
        first = jnp.abs(largest) / most if bits == "int8" else largest / least
        low = high = jnp.zeros(())
        factors = _WIDER if bits == "int8" else np.zeros(0, np.float32)
    # Equal numbers are their offset.
    first = jnp.where(first == 0, 1e-30 if asymmetric else 1.0, first)

    def stored(scales: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        if not asymmetric:
            return scales, None
        # As bfloat16 has them: a cast there and back may be optimised away.
        scales = lax.reduce_precision(scales, 8, 7)
        middle = (low + high - scales * (least + most)) / 2
        return scales, lax.reduce_precision(middle, 8, 7)

    def error(scales: jax.Array) -> jax.Array:
        scales, offsets = stored(scales)
        coded = _value(_nearest(groups, scales, offsets, bits), scales, offsets)
        return ((coded - groups) ** 2).sum(-1, keepdims=True)

    def better(scales: jax.Array, factor: jax.Array) -> tuple[jax.Array, None]:
        other = first * factor
        return jnp.where(error(other) < error(scales), other, scales), None

    return stored(lax.scan(better, first, jnp.asarray(factors))[0])


def _nearest(x: Any, scales: Any, offsets: Any, bits: str) -> jax.Array:
    shifted = x if offsets is None else x - offsets
    return jnp.clip(jnp.round(shifted / scales), *_LIMITS[bits])


def _value(values: Any, scales: Any, offsets: Any) -> jax.Array:
    return values * scales if offsets is None else values * scales + offsets


def _rounded_in_turn(
    matrix: jax.Array, cov: jax.Array, bits: str, size: int, asymmetric: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    """Values `[outer, groups, size]` of a matrix `[outer, inner]`, and scales and offsets.

    With `U' U` the inverse of the covariance, `e_i = (w_i - coded(w_i)) / U_ii`, a rounded column
    leaves `w_j - e_i U_ij` to the columns `j` after it.
    """
    inner = cov.shape[0]
    # A little of the mean variance: few positions leave directions without any.
    damped = cov + 0.01 * jnp.trace(cov) / inner * jnp.eye(inner)
    upper = jnp.linalg.cholesky(jnp.linalg.inv(damped), upper=True)

    def group(columns: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        part = lax.dynamic_slice_in_dim(columns, start, size)
        scales, offsets = steps = _steps(part.T, bits, asymmetric)
        flat: Any = tuple(None if x is None else x[:, 0] for x in steps)
        rows = lax.dynamic_slice_in_dim(upper, start, size)
        inside = lax.dynamic_slice_in_dim(rows, start, size, axis=1)

        def column(part: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
            value = _nearest(part[at], flat[0], flat[1], bits)
            error = (part[at] - _value(value, flat[0], flat[1])) / inside[at, at]
            return part - inside[at][:, None] * error, (value.astype(jnp.int8), error)

        _, (values, errors) = lax.scan(column, part, jnp.arange(size))
        # Columns of this group and before it are done, whatever they become.
        return columns - rows.T @ errors, (values, scales, offsets)

    starts = jnp.arange(0, inner, size)
    _, (values, scales, offsets) = lax.scan(group, matrix.T, starts)
    steps = scales.swapaxes(0, 1), None if offsets is None else offsets.swapaxes(0, 1)
    return values.reshape(inner, -1).T, steps


def _products(x: jax.Array, codes: Codes) -> jax.Array:
    def dot(matrix: jax.Array) -> jax.Array:
        axes = (((1,), (1,)), ((), ()))
        return lax.dot_general(x, matrix, axes, preferred_element_type=jnp.float32)

    if x.dtype == jnp.float32 or codes.scales.shape[-1] > 1:
        return dot(codes._wide(x.dtype))
    # A scale of a whole row can wait, and small whole numbers are exact in bfloat16.
    out = dot(codes.values.astype(x.dtype)) * codes.scales[:, 0].astype(jnp.float32)
    if codes.offsets is None:
        return out
    sums = x.astype(jnp.float32).sum(-1, keepdims=True)
    return out + sums * codes.offsets[:, 0].astype(jnp.float32)


@jax.custom_jvp
def _few_products(x: jax.Array, codes: Codes) -> jax.Array:
    def otherwise(x: jax.Array, *parts: jax.Array) -> jax.Array:
        return _products(x, dataclasses.replace(codes, **dict(zip(names, parts, strict=True))))

    names = [n for n in ("values", "scales", "offsets") if getattr(codes, n) is not None]
    parts = [getattr(codes, name) for name in names]
    return native.on_cpu(native.code_products, otherwise, x, *parts)


@_few_products.defjvp
def _linear(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # XLA does not look into the kernel.
    return _few_products(*primals), jax.jvp(_products, primals, tangents)[1]
