"""Inputs of a sweep's kernels: its arrays with a single axis of positions, packed."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from logitjax.losses.sweep._engine import Operands, Projection, Sweep, compute_dtype
from logitjax.losses.sweep._head import Head

_SUBLANES = 8


class Packed:
    """Arrays that start with the positions, `[T, ...]`, in the form that kernels take and return.

    An array `[T, 1]` would take 512 bytes per position, all lanes of a register for one number. So
    these are stacked as `[n, T]`, one array per type; others remain `[T, n]`. `like` are the
    arrays, or their shapes.
    """

    def __init__(self, like: Any):
        leaves, self._form = jax.tree.flatten(like)
        self._like = [(x.ndim, x.dtype) for x in leaves]
        kinds = [_kind(x.dtype) if x.ndim == 1 else None for x in leaves]
        self.kinds = list(dict.fromkeys(kind for kind in kinds if kind is not None))
        # For each leaf its stacked array and row, or its index among the others.
        lengths = [0] * (len(self.kinds) + 1)
        self._places = []
        for kind in kinds:
            array = len(self.kinds) if kind is None else self.kinds.index(kind)
            self._places.append((array, lengths[array]))
            lengths[array] += 1
        self.counts = [-(-n // _SUBLANES) * _SUBLANES for n in lengths[:-1]]
        self.widths = [math.prod(x.shape[1:]) for x in leaves if x.ndim != 1]
        self.wide_kinds = [_kind(x.dtype) for x in leaves if x.ndim != 1]

    def pack(self, tree: Any, length: int) -> Any:
        """Return packed arrays `[n, length]`, zero beyond the last position, and the others."""
        rows: list[list[jax.Array]] = [[] for _ in self.kinds]
        wide = []
        for x, (ndim, dtype), (array, _) in zip(
            jax.tree.leaves(tree), self._like, self._places, strict=True
        ):
            x = x.astype(_kind(dtype))
            if ndim == 1:
                rows[array].append(x)
            else:
                wide.append(x.reshape(x.shape[0], -1))
        stacked = [jnp.stack(x) for x in rows]
        beyond = [(n - len(x), length - x.shape[1]) for n, x in zip(self.counts, stacked)]
        packed = [jnp.pad(x, ((0, n), (0, t))) for x, (n, t) in zip(stacked, beyond)]
        return packed, wide

    def unpack(self, row: Callable[[int, int], Any], wide: Callable[[int], Any]) -> Any:
        """Build the tree from the results of `row(array, index)` and `wide(index)`."""
        values = []
        for (ndim, dtype), (array, index) in zip(self._like, self._places, strict=True):
            value = row(array, index) if ndim == 1 else wide(index)
            values.append(value != 0 if dtype == jnp.bool_ else value)
        return jax.tree.unflatten(self._form, values)


def _kind(dtype: Any) -> Any:
    """Return a type's kernel type: numbers have 32 bits there (64 in an interpreter)."""
    wide = jnp.issubdtype(dtype, jnp.floating)
    return jnp.promote_types(dtype, jnp.float32) if wide else jnp.dtype(jnp.int32)


class Inputs(NamedTuple):
    """A kernel's arrays, with two axes each; or their block specs, or a program's references."""

    hidden: Any  # [T, H], a side each
    # `Packed`: [n, T] each.
    rows: Any
    wide: Any  # [T, n] each
    # For each side: its kernel, and its bias as [1, V].
    heads: Any
    where: Any  # [1, V], or None
    scales: Any  # [1, 1], a side each
    start: Any  # [1, 1], id of the first column of this shard


def make_inputs(sweep: Sweep, operands: Operands, packed: Packed, tree: Any, length: int) -> Inputs:
    """Make the arrays; packed ones have length `length`."""

    def head(side: Projection) -> Head:
        kernel, bias = side.head.kernel.astype(compute_dtype(side)), side.head.bias
        bias = None if bias is None else bias[None]
        return dataclasses.replace(side.head, kernel=kernel, bias=bias)

    shard = 0 if sweep.axis_name is None else lax.axis_index(sweep.axis_name)
    start = jnp.full((1, 1), shard * operands.student.head.vocab_size(), jnp.int32)
    where = operands.vocab_where
    rows, wide = packed.pack(tree, length)
    return Inputs(
        hidden=[side.hidden.astype(compute_dtype(side)) for side in operands.sides],
        rows=rows,
        wide=wide,
        heads=[head(side) for side in operands.sides],
        where=None if where is None else where.astype(jnp.int32)[None],
        scales=[side.inverse_temperature.reshape(1, 1) for side in operands.sides],
        start=sweep.vary(start),
    )


def cost(
    inputs: Inputs, vocab: int, shapes: Any, times: tuple[int, int], products: int = 0
) -> pl.CostEstimate:
    """Estimate the cost of a kernel, which is opaque to the compiler.

    `shapes` are those of results, with their types; `times` how often arrays by position and by
    column are read; `products` counts products besides the logits.
    """
    positions = inputs.hidden[0].shape[0]

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    read = times[0] * size(inputs[:3]) + times[1] * size((inputs.heads, inputs.where))
    written = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in shapes)
    widths = [x.shape[1] for x in inputs.hidden]
    return pl.CostEstimate(
        flops=2 * positions * vocab * (sum(widths) + products * widths[0]),
        bytes_accessed=read + written,
        transcendentals=positions * vocab * len(widths),
    )


def shape_of(shape: tuple[int, ...], dtype: Any, inputs: Inputs) -> jax.ShapeDtypeStruct:
    """Shape of a result, which varies over the mesh like the inputs."""
    kind = jax.typeof(inputs.hidden[0]).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
