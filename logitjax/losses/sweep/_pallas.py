"""The engine `pallas`: the forward half of a sweep as one kernel, whatever the statistic.

A program of the grid has a tile of positions and a tile of the vocabulary on chip, forms their
logits in one product over the whole hidden axis, and calls `Statistic.absorb` on them: a statistic
is traced inside the kernel, so each has its kernel without another line. Logits never reach the
device's memory. The backward half is that of the engine `scan`.

On a TPU (Mosaic) the tiles of the vocabulary come one after the other and the state stays on chip.
On a GPU (Triton) programs have no order: each tile writes a state of its own, and
`Statistic.reduce`, which joins the states of devices, joins those of the tiles. On CPU the TPU's
kernel is interpreted, which is for tests.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from logitjax.losses.sweep._bins import Binned, settle
from logitjax.losses.sweep._engine import (
    Operands,
    Projection,
    Sweep,
    compute_dtype,
    contract,
    finished_logits,
    sum_dtype,
    swept,
)
from logitjax.losses.sweep._ids import NOWHERE
from logitjax.losses.sweep._readout import ReadoutStatistic
from logitjax.losses.sweep._statistic import LogitBlock

# What the interpreter is told; tests have it look for races.
INTERPRET: Any = True
# Three quarters of the smallest on-chip memory of v5e, v5p, v6e and TPU7x: 64 MiB a core. A quarter
# of what a kernel may take is for what the sizes of its tiles do not tell, at least so much.
_ON_CHIP, _LEAST_SPARE = 48 * 2**20, 4 * 2**20
# As many rows as there is room for first: each byte of the head serves that many products.
_ROWS = (1024, 512, 256, 128)
_COLUMNS = (2048, 1024, 512, 256, 128)
_LANES = 128
# Arrays of the size of a tile of logits that are alive at a time, float32.
_TILE_ARRAYS = 5
# Of the hidden axis, so much at a time is copied out of a tile for the product.
_TPU_STEP = 512
# Triton: tiles of 128 by 128 whose products read 64 of the hidden axis at a time fit the shared
# memory of an H100 (96 KiB of 227 with three stages).
_GPU_TILE, _GPU_STEP = 128, 64
# Name of the axis over tiles of columns.
_TILES = "logitjax_tiles"


class Tiles(NamedTuple):
    """Positions and columns of a program of the grid, and the on-chip bytes that it takes."""

    rows: int
    columns: int
    on_chip: int


def choose_tiles(
    positions: int,
    vocab: int,
    widths: Sequence[int],
    numbers: Sequence[int],
    *,
    multiple: int = _LANES,
    most: int = _ON_CHIP,
) -> Tiles:
    """The largest tiles that fit on chip.

    Args:
        positions: positions of the batch.
        vocab: entries of the vocabulary.
        widths: bytes of one hidden state: the student's, and a teacher's.
        numbers: how many numbers a position each other array has that goes in or out.
        multiple: of which columns are a multiple.
        most: bytes there are.
    """
    # A number a position fills the lanes of a register too.
    row_bytes = sum(4 * -(-number // _LANES) * _LANES for number in numbers)
    for rows in _ROWS:
        for columns in _COLUMNS:
            columns = -(-columns // multiple) * multiple
            # All that moves is there twice: the next comes while one is read.
            moved = sum(2 * (rows + columns) * width for width in widths)
            logits = _TILE_ARRAYS * 4 * rows * columns * len(widths)
            copied = (rows + columns) * max(min(width, 4 * _TPU_STEP) for width in widths)
            size = moved + logits + copied + 2 * rows * row_bytes
            if size <= most:
                rows = min(rows, -(-positions // 32) * 32)
                return Tiles(rows, min(columns, -(-vocab // multiple) * multiple), size)
    raise ValueError(
        f"blocks.engine: expected 'scan' or 'rows' for hidden states of {max(widths)} bytes, too "
        "wide for a tile, got 'pallas'"
    )


def on_tpu(sweep: Sweep, operands: Operands) -> Any:
    """All passes of the statistic, as `swept`: outputs and residuals, `[*batch, ...]`."""
    return _flat(_tpu_state, sweep, operands)


def on_gpu(sweep: Sweep, operands: Operands) -> Any:
    """The same by Triton."""
    return _flat(_gpu_state, sweep, operands)


def interpreted(sweep: Sweep, operands: Operands) -> Any:
    """The TPU's kernel, interpreted."""
    return _flat(functools.partial(_tpu_state, interpret=INTERPRET), sweep, operands)


FORWARD = {"tpu": on_tpu, "gpu": on_gpu, "cpu": interpreted}


def _flat(state_of: Callable[..., Any], sweep: Sweep, operands: Operands) -> Any:
    batch = operands.student.hidden.shape[:-1]

    def flat(x: Any) -> jax.Array:
        return x.reshape(math.prod(batch), *x.shape[len(batch) :])

    sides = [side._replace(hidden=flat(side.hidden)) for side in operands.sides]
    operands = operands._replace(
        student=sides[0],
        teacher=sides[1] if len(sides) == 2 else None,
        tokens=jax.tree.map(flat, operands.tokens),
    )
    found = _passes(state_of, sweep, operands)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), found)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _passes(state_of: Callable[..., Any], sweep: Sweep, operands: Operands) -> Any:
    statistic, passed = sweep.statistic, None
    outputs = residuals = None
    binned = None
    if isinstance(statistic, ReadoutStatistic) and statistic.k:
        binned = Binned.of(statistic)
    for number in range(statistic.passes):
        if binned is None:
            read = operands if statistic.reads_teacher(number) else operands._replace(teacher=None)
            state = state_of(sweep, read, passed)
        else:
            kept = state_of(dataclasses.replace(sweep, statistic=binned), operands, passed)
            state = settle(sweep, operands, binned, kept)
        if sweep.axis_name is not None:
            state = statistic.reduce(state, sweep.axis_name, passed)
        outputs, residuals = statistic.finish(state, passed)
        passed = residuals
    return outputs, residuals


@_passes.defjvp
def _passes_jvp(state_of: Any, sweep: Sweep, primals: Any, tangents: Any) -> Any:
    """For second derivatives, which a kernel does not have: the same sums by blocks."""
    return jax.jvp(functools.partial(swept, sweep), primals, tangents)


class _Inputs(NamedTuple):
    """A kernel's arrays, of two axes each; or how they are cut, or what a program has of them."""

    hidden: Any  # [T, H], a side each
    tokens: Any  # leaves [T, n]
    passed: Any  # leaves [T, n]
    heads: Any  # a side each: its kernel, and its bias as [1, V]
    where: Any  # [1, V], or None
    scales: Any  # [1, 1], a side each
    start: Any  # [1, 1], id of the first column of this shard


def _inputs(sweep: Sweep, operands: Operands, passed: Any) -> _Inputs:
    def rows(x: jax.Array) -> jax.Array:
        # Booleans have no place in a device's memory.
        return x.reshape(x.shape[0], -1).astype(jnp.int32 if x.dtype == jnp.bool_ else x.dtype)

    def head(side: Projection) -> Any:
        kernel, bias = side.head.kernel.astype(compute_dtype(side)), side.head.bias
        return dataclasses.replace(
            side.head, kernel=kernel, bias=None if bias is None else bias[None]
        )

    shard = 0 if sweep.axis_name is None else lax.axis_index(sweep.axis_name)
    start = jnp.full((1, 1), shard * operands.student.head.vocab_size(), jnp.int32)
    where = operands.vocab_where
    return _Inputs(
        hidden=[side.hidden.astype(compute_dtype(side)) for side in operands.sides],
        tokens=jax.tree.map(rows, operands.tokens),
        passed=jax.tree.map(rows, passed),
        heads=[head(side) for side in operands.sides],
        where=None if where is None else where.astype(jnp.int32)[None],
        scales=[side.inverse_temperature.reshape(1, 1) for side in operands.sides],
        start=sweep.vary(start),
    )


def _like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _as_given(values: Any, like: Any) -> Any:
    """What `_Inputs` has as `[T, n]`, in its own shape and type again."""

    def one(value: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        value = value[:, 0] if len(like.shape) == 1 else value
        return value != 0 if like.dtype == jnp.bool_ else value

    return jax.tree.map(one, values, like)


def _absorb(sweep: Sweep, state: Any, sides: list, ids: jax.Array, tokens: Any, passed: Any) -> Any:
    teacher = sides[1] if len(sides) == 2 else None
    # No tile repeats a column of another, and few have more than one id of a position.
    block = LogitBlock(sides[0], teacher, ids, 0, tokens, together=1)
    return sweep.statistic.absorb(state, block, passed)


def _tpu_state(sweep: Sweep, operands: Operands, passed: Any, *, interpret: Any = False) -> Any:
    """The statistic's state after all columns, `[T]`."""
    inputs = _inputs(sweep, operands, passed)
    like, dtype = _like((operands.tokens, passed)), sum_dtype(operands.student)
    positions, vocab = inputs.hidden[0].shape[0], operands.student.head.vocab_size()
    state_like = jax.eval_shape(lambda p: sweep.statistic.start((positions,), dtype, p), passed)
    leaves, form = jax.tree.flatten(state_like)
    widths_out = [math.prod(x.shape[1:]) for x in leaves]
    numbers = [math.prod(x.shape[1:]) for x in (*jax.tree.leaves(like), *leaves)]
    widths = [x.shape[1] * x.dtype.itemsize for x in inputs.hidden]
    multiple = sweep.statistic.bins if isinstance(sweep.statistic, Binned) else _LANES
    tiles = choose_tiles(positions, vocab, widths, numbers, multiple=multiple)
    grid = (pl.cdiv(positions, tiles.rows), pl.cdiv(vocab, tiles.columns))
    specs = _tpu_specs(inputs, tiles)
    arrays, layout = jax.tree.flatten(inputs)

    def kernel(*refs: Any) -> None:
        tile = pl.program_id(1)
        at, out = jax.tree.unflatten(layout, refs[: len(arrays)]), refs[len(arrays) :]
        heads = [dataclasses.replace(head, kernel=None) for head in at.heads]
        here = jax.tree.map(lambda ref: ref[...], at._replace(hidden=None, heads=heads))
        tokens, before = _as_given((here.tokens, here.passed), like)

        def store(state: Any) -> None:
            for ref, value in zip(out, jax.tree.leaves(state), strict=True):
                ref[...] = value[:, None] if value.ndim == 1 else value

        @pl.when(tile == 0)
        def _() -> None:
            store(sweep.statistic.start((tiles.rows,), dtype, before))

        ids = tile * tiles.columns + lax.broadcasted_iota(jnp.int32, (1, tiles.columns), 1)
        valid = ids < vocab if here.where is None else (ids < vocab) & (here.where != 0)
        products = [
            _tpu_product(hidden, head.kernel, head.axis)
            for hidden, head in zip(at.hidden, at.heads, strict=True)
        ]
        sides = [
            finished_logits(logits, head, scale, valid)
            for logits, head, scale in zip(products, here.heads, here.scales, strict=True)
        ]
        state = _as_given(jax.tree.unflatten(form, [ref[...] for ref in out]), state_like)
        # Past the end of a shard are ids that are the next one's.
        ids = jnp.where(ids < vocab, here.start + ids, NOWHERE)
        store(_absorb(sweep, state, sides, ids, tokens, before))

    found = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=jax.tree.leaves(specs),
        out_specs=[pl.BlockSpec((tiles.rows, n), lambda i, j: (i, 0)) for n in widths_out],
        out_shape=[
            _shape_of((positions, n), x.dtype, inputs)
            for n, x in zip(widths_out, leaves, strict=True)
        ],
        cost_estimate=_cost(inputs, vocab, sum(widths_out), grid),
        # The state of a tile of positions stays while the vocabulary goes by.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tiles.on_chip + max(tiles.on_chip // 3, _LEAST_SPARE),
        ),
        interpret=interpret,
    )(*arrays)
    return _as_given(jax.tree.unflatten(form, found), state_like)


def _tpu_product(hidden: Any, kernel: Any, axis: int) -> jax.Array:
    """Logits of a tile, a slice of the hidden axis at a time: what is sliced is copied."""
    width = hidden.shape[1]
    step = _TPU_STEP if width % 128 == 0 else width
    parts = []
    for start in range(0, width, step):
        some = slice(start, min(start + step, width))
        w = kernel[:, some] if axis == 0 else kernel[some]
        parts.append(contract(hidden[:, some], (1,), w, (1 - axis,)))
    return functools.reduce(jnp.add, parts)


def _tpu_specs(inputs: _Inputs, tiles: Tiles) -> _Inputs:
    """How each array is cut over the grid `(positions, columns)`."""

    def by_row(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((tiles.rows, x.shape[1]), lambda i, j: (i, 0))

    def by_column(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, tiles.columns), lambda i, j: (0, j))

    def head(head: Any) -> Any:
        kernel = pl.BlockSpec((tiles.columns, head.kernel.shape[1]), lambda i, j: (j, 0))
        if head.axis == 1:
            kernel = pl.BlockSpec((head.kernel.shape[0], tiles.columns), lambda i, j: (0, j))
        bias = None if head.bias is None else by_column(head.bias)
        return dataclasses.replace(head, kernel=kernel, bias=bias)

    def once(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1), lambda i, j: (0, 0))

    each = jax.tree.map
    return _Inputs(
        hidden=each(by_row, inputs.hidden),
        tokens=each(by_row, inputs.tokens),
        passed=each(by_row, inputs.passed),
        heads=[head(x) for x in inputs.heads],
        where=each(by_column, inputs.where),
        scales=each(once, inputs.scales),
        start=once(inputs.start),
    )


def _shape_of(shape: tuple[int, ...], dtype: Any, inputs: _Inputs) -> jax.ShapeDtypeStruct:
    """Of a result, which differs over the mesh as the inputs do."""
    kind = jax.typeof(inputs.hidden[0]).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def _cost(inputs: _Inputs, vocab: int, numbers: int, grid: tuple[int, int]) -> pl.CostEstimate:
    """What the compiler cannot see into a kernel for.

    A tile of positions is read once, as its columns go by; each column for every tile of positions,
    unless there is one tile of columns, which stays.
    """
    positions = inputs.hidden[0].shape[0]

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    times = grid[0] if grid[1] > 1 else 1
    moved = size(inputs[:3]) + times * size((inputs.heads, inputs.where)) + 4 * positions * numbers
    return pl.CostEstimate(
        flops=sum(2 * positions * vocab * x.shape[1] for x in inputs.hidden),
        bytes_accessed=moved,
        transcendentals=positions * vocab * len(inputs.hidden),
    )


def _gpu_state(sweep: Sweep, operands: Operands, passed: Any, *, interpret: bool = False) -> Any:
    """As `_tpu_state`; every tile of columns leaves its own state, and they are joined."""
    inputs = _inputs(sweep, operands, passed)
    like, dtype = _like((operands.tokens, passed)), sum_dtype(operands.student)
    positions, vocab = inputs.hidden[0].shape[0], operands.student.head.vocab_size()
    leaves, form = jax.tree.flatten(
        jax.eval_shape(lambda p: sweep.statistic.start((positions,), dtype, p), passed)
    )
    if any(len(x.shape) != 1 for x in (*leaves, *jax.tree.leaves(like))):
        raise ValueError(
            f"blocks.engine: expected 'scan' or 'rows' for a {type(sweep.statistic).__name__} on a "
            "GPU, where a kernel has one number a position, got 'pallas'"
        )
    grid = (pl.cdiv(positions, _GPU_TILE), pl.cdiv(vocab, _GPU_TILE))
    arrays, layout = jax.tree.flatten(inputs)

    def kernel(*refs: Any) -> None:
        here = jax.tree.unflatten(layout, refs[: len(arrays)])
        rows, columns = (
            pl.program_id(axis) * _GPU_TILE + jnp.arange(_GPU_TILE, dtype=jnp.int32)
            for axis in range(2)
        )
        row = pl.ds(pl.program_id(0) * _GPU_TILE, _GPU_TILE)
        column = pl.ds(pl.program_id(1) * _GPU_TILE, _GPU_TILE)
        zero = jnp.int32(0)  # the interpreter takes no Python number in an index

        def of_rows(ref: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
            value = plgpu.load(ref.at[row, zero], mask=rows < positions, other=0)
            return value != 0 if like.dtype == jnp.bool_ else value

        def of_columns(ref: Any) -> jax.Array:
            return plgpu.load(ref.at[zero, column], mask=columns < vocab, other=0)[None]

        tokens, before = jax.tree.map(of_rows, (here.tokens, here.passed), like)
        valid = (columns < vocab)[None]
        if here.where is not None:
            valid &= of_columns(here.where) != 0
        sides = []
        for hidden, head, scale in zip(here.hidden, here.heads, here.scales, strict=True):
            logits = _gpu_product(hidden, head.kernel, head.axis, (row, rows < positions), column)
            bias = None if head.bias is None else of_columns(head.bias)
            there = dataclasses.replace(head, bias=bias)
            sides.append(finished_logits(logits, there, scale[0, 0], valid))
        state = sweep.statistic.start((_GPU_TILE,), dtype, before)
        ids = jnp.where(columns < vocab, here.start[0, 0] + columns, NOWHERE)[None]
        state = _absorb(sweep, state, sides, ids, tokens, before)
        for ref, value in zip(refs[len(arrays) :], jax.tree.leaves(state), strict=True):
            plgpu.store(ref.at[pl.program_id(1), row], value, mask=rows < positions)

    found = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=[_shape_of((grid[1], positions), x.dtype, inputs) for x in leaves],
        cost_estimate=_cost(inputs, vocab, len(leaves) * grid[1], grid),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
    )(*arrays)
    joined = jax.vmap(
        lambda state: sweep.statistic.reduce(state, _TILES, passed), axis_name=_TILES
    )(jax.tree.unflatten(form, found))
    return jax.tree.map(lambda x: x[0], joined)


def _gpu_product(hidden: Any, kernel: Any, axis: int, rows: Any, column: Any) -> jax.Array:
    """Logits of a tile, `[rows, columns]`, a few entries of the hidden axis at a time."""
    width, vocab = hidden.shape[1], kernel.shape[axis]
    (row, row_mask), columns = rows, column.start + jnp.arange(_GPU_TILE, dtype=jnp.int32)

    def step(k: Any, total: jax.Array) -> jax.Array:
        some = pl.ds(k * _GPU_STEP, _GPU_STEP)
        inner = k * _GPU_STEP + jnp.arange(_GPU_STEP, dtype=jnp.int32) < width
        x = plgpu.load(hidden.at[row, some], mask=row_mask[:, None] & inner[None], other=0)
        if axis == 0:
            mask = (columns < vocab)[:, None] & inner[None]
            w = plgpu.load(kernel.at[column, some], mask=mask, other=0).T
        else:
            mask = inner[:, None] & (columns < vocab)[None]
            w = plgpu.load(kernel.at[some, column], mask=mask, other=0)
        return total + contract(x, (1,), w, (0,))

    zeros = jnp.zeros((_GPU_TILE, _GPU_TILE), jnp.float32)
    return lax.fori_loop(0, pl.cdiv(width, _GPU_STEP), step, zeros)
