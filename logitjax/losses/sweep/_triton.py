"""The engine `pallas` on a GPU: the forward half of a sweep by Triton.

Programs have no order there: each tile of columns leaves a state of its own, and
`Statistic.reduce`, which joins the states of devices, joins those of the tiles.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from logitjax.losses.sweep._engine import Operands, Sweep, contract, finished_logits, sum_dtype
from logitjax.losses.sweep._ids import NOWHERE
from logitjax.losses.sweep._kernel_inputs import Packed, cost, make_inputs, shape_of
from logitjax.losses.sweep._statistic import LogitBlock

# Tiles of 128 by 128 whose products read 64 of the hidden axis at a time fit the shared memory of
# an H100 (96 KiB of 227 with three stages).
_TILE, _STEP = 128, 64
# Name of the axis over tiles of columns.
_TILES = "logitjax_tiles"


def gpu_state(sweep: Sweep, operands: Operands, passed: Any, *, interpret: bool = False) -> Any:
    """The statistic's state after all columns, `[T]`."""
    dtype, statistic = sum_dtype(operands.student), sweep.statistic
    positions, vocab = operands.student.hidden.shape[0], operands.student.head.vocab_size()
    tree = (operands.tokens, passed)
    leaves, form = jax.tree.flatten(
        jax.eval_shape(lambda p: statistic.start((positions,), dtype, p), passed)
    )
    if any(x.ndim != 1 for x in (*leaves, *jax.tree.leaves(tree))):
        raise ValueError(
            f"blocks.engine: expected 'scan' or 'rows' for a {type(statistic).__name__} on a "
            "GPU, where a kernel has one number a position, got 'pallas'"
        )
    packed = Packed(tree)
    inputs = make_inputs(sweep, operands, packed, tree, positions)
    grid = (pl.cdiv(positions, _TILE), pl.cdiv(vocab, _TILE))
    arrays, layout = jax.tree.flatten(inputs)

    def kernel(*refs: Any) -> None:
        here = jax.tree.unflatten(layout, refs[: len(arrays)])
        rows, columns = (
            pl.program_id(axis) * _TILE + jnp.arange(_TILE, dtype=jnp.int32) for axis in range(2)
        )
        row = pl.ds(pl.program_id(0) * _TILE, _TILE)
        column = pl.ds(pl.program_id(1) * _TILE, _TILE)
        zero = jnp.int32(0)  # the interpreter takes no Python number in an index

        def of_row(array: int, index: int) -> jax.Array:
            place = here.rows[array].at[jnp.int32(index), row]
            return plgpu.load(place, mask=rows < positions, other=0)

        def of_columns(ref: Any) -> jax.Array:
            return plgpu.load(ref.at[zero, column], mask=columns < vocab, other=0)[None]

        tokens, before = packed.unpack(of_row, here.wide.__getitem__)
        valid = (columns < vocab)[None]
        if here.where is not None:
            valid &= of_columns(here.where) != 0
        sides = []
        for hidden, head, scale in zip(here.hidden, here.heads, here.scales, strict=True):
            logits = _product(hidden, head.kernel, head.axis, (row, rows < positions), column)
            bias = None if head.bias is None else of_columns(head.bias)
            there = dataclasses.replace(head, bias=bias)
            sides.append(finished_logits(logits, there, scale[0, 0], valid))
        ids = jnp.where(columns < vocab, here.start[0, 0] + columns, NOWHERE)[None]
        teacher = sides[1] if len(sides) == 2 else None
        block = LogitBlock(sides[0], teacher, ids, 0, tokens, together=1)
        state = statistic.absorb(statistic.start((_TILE,), dtype, before), block, before)
        for ref, value in zip(refs[len(arrays) :], jax.tree.leaves(state), strict=True):
            plgpu.store(ref.at[pl.program_id(1), row], value, mask=rows < positions)

    shapes = [((grid[1], positions), x.dtype) for x in leaves]
    found = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=[shape_of(shape, kind, inputs) for shape, kind in shapes],
        cost_estimate=cost(inputs, vocab, shapes, (1, grid[0])),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
    )(*arrays)
    joined = jax.vmap(lambda state: statistic.reduce(state, _TILES, passed), axis_name=_TILES)(
        jax.tree.unflatten(form, found)
    )
    return jax.tree.map(lambda x: x[0], joined)


def _product(hidden: Any, kernel: Any, axis: int, rows: Any, column: Any) -> jax.Array:
    """Logits of a tile, `[rows, columns]`, a few entries of the hidden axis at a time."""
    width, vocab = hidden.shape[1], kernel.shape[axis]
    (row, row_mask), columns = rows, column.start + jnp.arange(_TILE, dtype=jnp.int32)

    def step(k: Any, total: jax.Array) -> jax.Array:
        some = pl.ds(k * _STEP, _STEP)
        inner = k * _STEP + jnp.arange(_STEP, dtype=jnp.int32) < width
        x = plgpu.load(hidden.at[row, some], mask=row_mask[:, None] & inner[None], other=0)
        if axis == 0:
            mask = (columns < vocab)[:, None] & inner[None]
            w = plgpu.load(kernel.at[column, some], mask=mask, other=0).T
        else:
            mask = inner[:, None] & (columns < vocab)[None]
            w = plgpu.load(kernel.at[some, column], mask=mask, other=0)
        return total + contract(x, (1,), w, (0,))

    zeros = jnp.zeros((_TILE, _TILE), jnp.float32)
    return lax.fori_loop(0, pl.cdiv(width, _STEP), step, zeros)
