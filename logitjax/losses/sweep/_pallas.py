"""The engine `pallas`: a sweep as kernels, whatever the statistic.

A program of the grid has a tile of positions and a tile of the vocabulary on chip, forms their
logits, and calls `Statistic.absorb`, or `Statistic.gradient`, on them: a statistic is traced inside
the kernels, so each has its own without another line. No logits reach the device's memory.

On a TPU (Mosaic) there are three kernels. The first sums up the state of a tile of positions while
the vocabulary goes by. The gradients take one each, for each is a sum over what the other is split
by: that of the hidden states stays on chip while the vocabulary goes by, that of the head while the
positions do. Both form the logits again, so a step is five products of the head's size where blocks
take four, and holds nothing but a few numbers a position. On CPU these kernels are interpreted,
which is for tests. On a GPU (Triton, `_triton`) there is the first alone, and the gradients are
those of `scan`; as they are where a statistic does not say `gradient_in_tiles`.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from logitjax.losses.sweep._bins import Binned, settle
from logitjax.losses.sweep._engine import (
    Operands,
    Projection,
    Sweep,
    blockwise_gradients,
    compute_dtype,
    contract,
    finished_logits,
    raw_gradient,
    sum_dtype,
    swept,
)
from logitjax.losses.sweep._head import Head
from logitjax.losses.sweep._ids import NOWHERE
from logitjax.losses.sweep._readout import ReadoutStatistic
from logitjax.losses.sweep._statistic import LogitBlock, Statistic

# What the interpreter is told; tests have it look for races.
INTERPRET: Any = True
# Three quarters of the smallest on-chip memory of v5e, v5p, v6e and TPU7x: 64 MiB a core. A quarter
# of what a kernel may take is for what the sizes of its tiles do not tell, at least so much.
_ON_CHIP, _LEAST_SPARE = 48 * 2**20, 4 * 2**20
# As many of what stays as there is room for first: so many products has each byte that goes by.
_ROWS = (1024, 512, 256, 128)
_COLUMNS = (2048, 1024, 512, 256, 128)
_LANES, _SUBLANES = 128, 8
# Arrays of the size of a tile of logits that are alive at a time, float32.
_TILE_ARRAYS = 5
# Of the hidden axis, so much at a time is copied out of a tile for the product.
_STEP = 512


class Tiles(NamedTuple):
    """Positions and columns of a program of the grid, and the on-chip bytes that it takes."""

    rows: int
    columns: int
    on_chip: int


class Packed:
    """Arrays that start with the positions, `[T, ...]`, as a kernel takes and gives them.

    An array `[T, 1]` would take 512 bytes a position, the lanes of a register for one number. So
    all that have one number a position lie under each other, `[n, T]`, one array for each type.
    Others are as they are, `[T, n]`.

    Args:
        like: the arrays, or their shapes.
    """

    def __init__(self, like: Any):
        leaves, self._form = jax.tree.flatten(like)
        self._like = [(x.ndim, x.dtype) for x in leaves]
        kinds = [_kind(x.dtype) if x.ndim == 1 else None for x in leaves]
        self.kinds = list(dict.fromkeys(kind for kind in kinds if kind is not None))
        # Of each leaf the array that it is in and its row there, or its place among the others.
        seen = [0] * (len(self.kinds) + 1)
        self._places = []
        for kind in kinds:
            array = len(self.kinds) if kind is None else self.kinds.index(kind)
            self._places.append((array, seen[array]))
            seen[array] += 1
        self.counts = [-(-n // _SUBLANES) * _SUBLANES for n in seen[:-1]]
        self.widths = [math.prod(x.shape[1:]) for x in leaves if x.ndim != 1]
        self.wide_kinds = [_kind(x.dtype) for x in leaves if x.ndim != 1]

    def pack(self, tree: Any, length: int) -> Any:
        """The arrays `[n, length]`, zero beyond the last position, and the others."""
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
        """The tree of what `row(array, index)` and `wide(index)` give."""
        values = []
        for (ndim, dtype), (array, index) in zip(self._like, self._places, strict=True):
            value = row(array, index) if ndim == 1 else wide(index)
            values.append(value != 0 if dtype == jnp.bool_ else value)
        return jax.tree.unflatten(self._form, values)


def _kind(dtype: Any) -> Any:
    """What a type is in a kernel, where numbers have 32 bits (64 in an interpreter)."""
    wide = jnp.issubdtype(dtype, jnp.floating)
    return jnp.promote_types(dtype, jnp.float32) if wide else jnp.dtype(jnp.int32)


class Inputs(NamedTuple):
    """A kernel's arrays, of two axes each; or how they are cut, or what a program has of them."""

    hidden: Any  # [T, H], a side each
    rows: Any  # `Packed`: [n, T] each
    wide: Any  # [T, n] each
    heads: Any  # a side each: its kernel, and its bias as [1, V]
    where: Any  # [1, V], or None
    scales: Any  # [1, 1], a side each
    start: Any  # [1, 1], id of the first column of this shard


def make_inputs(sweep: Sweep, operands: Operands, packed: Packed, tree: Any, length: int) -> Inputs:
    """The arrays, those of numbers a position `length` long."""

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


def choose_tiles(
    positions: int,
    vocab: int,
    on_chip: Callable[[int, int], int],
    sizes: list[tuple[int, int]],
    *,
    multiple: int = _LANES,
) -> Tiles:
    """The first tiles that fit on chip.

    Args:
        positions: positions of the batch.
        vocab: entries of the vocabulary.
        on_chip: the bytes that so many rows and columns take.
        sizes: rows and columns, the best first.
        multiple: of which columns are a multiple.
    """
    for r, c in sizes:
        if (size := on_chip(r, c)) <= _ON_CHIP:
            r = min(r, -(-positions // 32) * 32)
            return Tiles(r, min(c, -(-vocab // multiple) * multiple), size)
    raise ValueError(
        "blocks.engine: expected 'scan' or 'rows' for hidden states that are too wide for a tile, "
        "got 'pallas'"
    )


def kernels(platform: str, statistic: Statistic) -> dict[str, Callable[..., Any] | None]:
    """The halves of a `Sweep` that are kernels: None where the blocks of `scan` do it."""
    if platform == "gpu":
        from logitjax.losses.sweep import _triton

        return {"forward": _partial(forward, _triton.gpu_state)}
    interpret = INTERPRET if platform == "cpu" else False
    backward = _partial(gradients, interpret) if statistic.gradient_in_tiles else None
    return {"forward": _partial(forward, _partial(tpu_state, interpret)), "gradients": backward}


# Equal ones are the same, for a sweep is a static argument.
_partial = functools.cache(functools.partial)


def flat(operands: Operands, *trees: Any) -> Any:
    """The same with one axis of positions, and what gives results their batch shape again."""
    batch = operands.student.hidden.shape[:-1]

    def one(x: Any) -> jax.Array:
        return x.reshape(math.prod(batch), *x.shape[len(batch) :])

    sides = [side._replace(hidden=one(side.hidden)) for side in operands.sides]
    operands = operands._replace(
        student=sides[0],
        teacher=sides[1] if len(sides) == 2 else None,
        tokens=jax.tree.map(one, operands.tokens),
    )

    def restore(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), tree)

    return operands, *(jax.tree.map(one, tree) for tree in trees), restore


def forward(state_of: Callable[..., Any], sweep: Sweep, operands: Operands) -> Any:
    """All passes of the statistic, as `swept`: outputs and residuals, `[*batch, ...]`."""
    operands, restore = flat(operands)
    return restore(_passes(state_of, sweep, operands))


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


class _Grid(NamedTuple):
    """A kernel over tiles of positions and of columns: the second of its axes goes by."""

    name: str
    packed: Packed
    inputs: Inputs
    tiles: Tiles
    rows_axis: int
    vocab: int

    @property
    def shape(self) -> tuple[int, ...]:
        count = pl.cdiv(self.inputs.hidden[0].shape[0], self.tiles.rows)
        columns = pl.cdiv(self.vocab, self.tiles.columns)
        return (count, columns) if self.rows_axis == 0 else (columns, count)

    def by(self, axis: int, *sides: int) -> pl.BlockSpec:
        """Blocks of `sides`, where -1 is a tile of the grid's `axis`."""
        tile = self.tiles.rows if axis == self.rows_axis else self.tiles.columns
        block = tuple(tile if side == -1 else side for side in sides)
        return pl.BlockSpec(
            block, lambda *at: tuple(at[axis] if side == -1 else 0 for side in sides)
        )

    def by_row(self, *sides: int) -> pl.BlockSpec:
        return self.by(self.rows_axis, *sides)

    def by_column(self, *sides: int) -> pl.BlockSpec:
        return self.by(1 - self.rows_axis, *sides)

    def head_specs(self, head: Head) -> Head:
        width = head.kernel.shape[1 - head.axis]
        kernel = self.by_column(-1, width) if head.axis == 0 else self.by_column(width, -1)
        bias = None if head.bias is None else self.by_column(1, -1)
        return dataclasses.replace(head, kernel=kernel, bias=bias)

    def specs(self) -> Inputs:
        once = pl.BlockSpec((1, 1), lambda *at: (0, 0))
        given = self.inputs
        return Inputs(
            hidden=[self.by_row(-1, x.shape[1]) for x in given.hidden],
            rows=[self.by_row(x.shape[0], -1) for x in given.rows],
            wide=[self.by_row(-1, x.shape[1]) for x in given.wide],
            heads=[self.head_specs(head) for head in given.heads],
            where=None if given.where is None else self.by_column(1, -1),
            scales=[once for _ in given.scales],
            start=once,
        )

    def read(self, at: Inputs) -> tuple[Any, Inputs]:
        """What the tile's positions have, and its small arrays."""
        heads = [dataclasses.replace(head, kernel=None) for head in at.heads]
        here = jax.tree.map(lambda ref: ref[...], at._replace(hidden=None, heads=heads))
        columns = [x.T for x in here.rows]
        return self.packed.unpack(
            lambda array, n: columns[array][:, n], here.wide.__getitem__
        ), here

    def block(self, at: Inputs, here: Inputs, tokens: Any) -> LogitBlock:
        """The logits of the tile."""
        size = self.tiles.columns
        first = pl.program_id(1 - self.rows_axis) * size
        ids = first + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        valid = ids < self.vocab if here.where is None else (ids < self.vocab) & (here.where != 0)
        sides = [
            finished_logits(_product(hidden, head.kernel, head.axis), small, scale, valid)
            for hidden, head, small, scale in zip(
                at.hidden, at.heads, here.heads, here.scales, strict=True
            )
        ]
        teacher = sides[1] if len(sides) == 2 else None
        # Past the end of a shard are ids that are the next one's.
        ids = jnp.where(ids < self.vocab, here.start + ids, NOWHERE)
        # No tile repeats a column of another, and few have more than one id of a position.
        return LogitBlock(sides[0], teacher, ids, 0, tokens, together=1)

    def call(
        self, kernel: Callable[..., None], out: Any, scratch: Any, products: int, interpret: Any
    ) -> Any:
        """`kernel(inputs, outputs, scratch)` over the grid; `out` has specs and shapes."""
        arrays, layout = jax.tree.flatten(self.inputs)
        specs, shapes = zip(*out, strict=True)
        ends = (len(arrays), len(arrays) + len(out))
        # What stays is read once; what goes by for every tile of what stays, unless there is one
        # tile of it, which stays too.
        often = self.shape[0] if self.shape[1] > 1 else 1
        times = (1, often) if self.rows_axis == 0 else (often, 1)

        def body(*refs: Any) -> None:
            at = jax.tree.unflatten(layout, refs[: ends[0]])
            kernel(at, refs[slice(*ends)], refs[ends[1] :])

        return pl.pallas_call(
            body,
            grid=self.shape,
            in_specs=jax.tree.leaves(self.specs()),
            out_specs=list(specs),
            out_shape=[shape_of(shape, kind, self.inputs) for shape, kind in shapes],
            scratch_shapes=[pltpu.VMEM(*shape) for shape in scratch],
            cost_estimate=cost(self.inputs, self.vocab, shapes, times, products),
            # What is summed up stays on chip while the other axis goes by.
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=self.tiles.on_chip + max(self.tiles.on_chip // 3, _LEAST_SPARE),
            ),
            interpret=interpret,
            name=f"logitjax_{self.name}_{self.tiles.rows}x{self.tiles.columns}",
        )(*arrays)


def cost(
    inputs: Inputs, vocab: int, shapes: Any, times: tuple[int, int], products: int = 0
) -> pl.CostEstimate:
    """What the compiler cannot see into a kernel for.

    Args:
        inputs: its arrays.
        vocab: entries of the vocabulary.
        shapes: of its results, with their types.
        times: how often what positions have is read, and what columns have.
        products: beside the logits.
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
    """Of a result, which differs over the mesh as the inputs do."""
    kind = jax.typeof(inputs.hidden[0]).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def _grid(
    sweep: Sweep,
    operands: Operands,
    tree: Any,
    name: str,
    *,
    held: Callable[[int, int], int],
    rows_axis: int = 0,
) -> _Grid:
    """A kernel's inputs and tiles; `held` gives the bytes of what it sums up and writes.

    Tiles are looked up in `tiles.json`, by chip, kernel and bytes of a hidden state, then follow
    from the sizes. An empty list there is what the compiler refused.
    """
    packed = Packed(tree)
    positions, vocab = operands.student.hidden.shape[0], operands.student.head.vocab_size()
    widths = [side.hidden.shape[1] * compute_dtype(side).itemsize for side in operands.sides]
    # A packed array is there once more with a number a row of lanes.
    row_bytes = sum(4 * n + 4 * _LANES for n in packed.counts)
    row_bytes += sum(4 * -(-n // _LANES) * _LANES for n in packed.widths)

    def on_chip(rows: int, columns: int) -> int:
        # All that moves is there twice: the next comes while one is read.
        moved = sum(2 * (rows + columns) * width for width in widths)
        logits = _TILE_ARRAYS * 4 * rows * columns * len(widths)
        copied = (rows + columns) * max(min(width, 4 * _STEP) for width in widths)
        return moved + logits + copied + 2 * rows * row_bytes + held(rows, columns)

    multiple = sweep.statistic.bins if isinstance(sweep.statistic, Binned) else _LANES
    columns = [-(-size // multiple) * multiple for size in _COLUMNS]
    sizes = [(r, c) for r in _ROWS for c in columns]
    if rows_axis == 1:
        # More columns than that save no more time, and leave none for the rows.
        sizes = [(r, c) for c in columns for r in _ROWS if c <= 1024]
    # A product that narrow fills no matrix unit.
    sizes.sort(key=lambda size: min(size) < 256)
    if multiple == _LANES and (known := _known_tiles(name, widths)) is not None:
        sizes = [*known, *sizes] if known else []
    tiles = choose_tiles(positions, vocab, on_chip, sizes, multiple=multiple)
    length = -(-positions // tiles.rows) * tiles.rows
    inputs = make_inputs(sweep, operands, packed, tree, length)
    return _Grid(name, packed, inputs, tiles, rows_axis, vocab)


def _known_tiles(name: str, widths: list[int]) -> list[tuple[int, int]] | None:
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    key = f"{device.device_kind}, {name}, {' + '.join(map(str, widths))}"
    return _table().get(key)


@functools.cache
def _table() -> dict[str, list[tuple[int, int]]]:
    table = json.loads((resources.files("logitjax.losses.sweep") / "tiles.json").read_text())
    return {key: [(rows, columns) for rows, columns in sizes] for key, sizes in table.items()}


def tpu_state(interpret: Any, sweep: Sweep, operands: Operands, passed: Any) -> Any:
    """The statistic's state after all columns, `[T]`."""
    dtype, positions = sum_dtype(operands.student), operands.student.hidden.shape[0]
    like = jax.eval_shape(lambda p: sweep.statistic.start((positions,), dtype, p), passed)
    state = Packed(like)
    widths = [math.prod(x.shape[1:]) for x in jax.tree.leaves(like)]
    # The state, which fills rows of lanes, and what is written of it.
    row_bytes = sum(3 * 4 * -(-n // _LANES) * _LANES for n in widths)
    tree = (operands.tokens, passed)
    grid = _grid(sweep, operands, tree, "state", held=lambda r, c: r * row_bytes)
    rows, length = grid.tiles.rows, grid.tiles.rows * grid.shape[0]

    def kernel(at: Inputs, out: Any, scratch: Any) -> None:
        tile = pl.program_id(1)
        (tokens, before), here = grid.read(at)

        def store(value: Any) -> None:
            for ref, leaf in zip(scratch, jax.tree.leaves(value), strict=True):
                ref[...] = leaf[:, None] if leaf.ndim == 1 else leaf

        @pl.when(tile == 0)
        def _() -> None:
            store(sweep.statistic.start((rows,), dtype, before))

        held = [
            ref[...] if x.ndim != 1 else ref[:, 0]
            for ref, x in zip(scratch, jax.tree.leaves(like), strict=True)
        ]
        held = jax.tree.unflatten(jax.tree.structure(like), held)
        store(sweep.statistic.absorb(held, grid.block(at, here, tokens), before))

        @pl.when(tile == grid.shape[1] - 1)
        def _() -> None:
            refs = [ref for ref, x in zip(scratch, jax.tree.leaves(like)) if x.ndim != 1]
            for ref, wide in zip(out[len(state.kinds) :], refs, strict=True):
                ref[...] = wide[...]
            narrow = [ref for ref, x in zip(scratch, jax.tree.leaves(like)) if x.ndim == 1]
            for kind, count, ref in zip(state.kinds, state.counts, out):
                some = [x[...] for x in narrow if x.dtype == kind]
                empty = jnp.zeros((rows, count - len(some)), kind)
                # No array has a side of zero on chip, so of a full one the last is left out.
                ref[...] = jnp.concatenate([*some, empty][:count], 1).T

    out = [
        (grid.by_row(n, -1), ((n, length), kind))
        for n, kind in zip(state.counts, state.kinds, strict=True)
    ] + [
        (grid.by_row(-1, n), ((positions, n), kind))
        for n, kind in zip(state.widths, state.wide_kinds, strict=True)
    ]
    scratch = [((rows, n), x.dtype) for n, x in zip(widths, jax.tree.leaves(like), strict=True)]
    found = grid.call(kernel, out, scratch, 0, interpret)
    wide = found[len(state.kinds) :]
    return state.unpack(lambda array, n: found[array][n, :positions], wide.__getitem__)


def gradients(interpret: Any, sweep: Sweep, *given: Any) -> tuple[jax.Array, Head]:
    """As `blockwise_gradients`, by kernels."""
    operands, residuals, cotangents, counts, restore = flat(*given)
    d_hidden, d_head = _gradients(interpret, sweep, operands, residuals, cotangents, counts)
    return restore(d_hidden), d_head


def _slope(sweep: Sweep, grid: _Grid, at: Inputs) -> tuple[jax.Array, jax.Array]:
    """The gradient by the logits of a tile before bias, and where positions count, `[T, 1]`."""
    (tokens, residuals, cotangents, counts), here = grid.read(at)
    counts = counts[:, None] != 0
    block = grid.block(at, here, tokens)
    raw = sweep.statistic.gradient(residuals, cotangents, block)
    side = Projection(at.hidden[0], here.heads[0], here.scales[0])
    return raw_gradient(side, block, raw, counts), counts


def _steps(width: int) -> list[slice]:
    """Of the hidden axis, what is read at a time: it is copied out of a tile for the product."""
    step = _STEP if width % _LANES == 0 else width
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def _of_hidden(sweep: Sweep, grid: _Grid, at: Inputs, out: Any, scratch: Any) -> None:
    """The kernel that sums up the gradient of the hidden states, as the vocabulary goes by."""
    (total,), (result,), tile = scratch, out, pl.program_id(1)
    kernel, axis = at.heads[0].kernel, at.heads[0].axis
    raw = _slope(sweep, grid, at)[0].astype(kernel.dtype)

    @pl.when(tile == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def add(exists: Any) -> None:
        for some in _steps(at.hidden[0].shape[1]):
            w = kernel[:, some] if axis == 0 else kernel[some]
            if exists is not None:
                w = jnp.where(exists, w, jnp.zeros((), w.dtype))
            total[:, some] += contract(raw, (1,), w, (axis,))

    # Past the end of the vocabulary is anything, and zero times it may be nan.
    last = grid.shape[1] - 1
    if rest := grid.vocab % grid.tiles.columns:
        sides = (grid.tiles.columns, 1) if axis == 0 else (1, grid.tiles.columns)
        exists = lax.broadcasted_iota(jnp.int32, sides, axis) < rest
        lax.cond(tile == last, lambda: add(exists), lambda: add(None))
    else:
        add(None)

    @pl.when(tile == last)
    def _() -> None:
        result[...] = total[...].astype(result.dtype)


def _of_head(sweep: Sweep, grid: _Grid, at: Inputs, out: Any, scratch: Any) -> None:
    """The kernel that sums up the gradient of the head, as the positions go by."""
    tile, hidden = pl.program_id(1), at.hidden[0]
    raw, counts = _slope(sweep, grid, at)
    cast = raw.astype(at.heads[0].kernel.dtype)

    @pl.when(tile == 0)
    def _() -> None:
        for total in scratch:
            total[...] = jnp.zeros_like(total)

    def add(counts: Any) -> None:
        for some in _steps(at.hidden[0].shape[1]):
            x = hidden[:, some]
            if counts is not None:
                x = jnp.where(counts, x, jnp.zeros((), x.dtype))
            scratch[0][:, some] += contract(cast, (0,), x, (0,))

    # As above: hidden states of positions that do not count.
    whole = jnp.min(jnp.where(counts, 1.0, 0.0)) > 0
    lax.cond(whole, lambda: add(None), lambda: add(counts))
    if len(out) == 2:
        scratch[1][...] += raw.sum(0, keepdims=True)

    @pl.when(tile == grid.shape[1] - 1)
    def _() -> None:
        if len(out) == 2:
            out[1][...] = scratch[1][...].astype(out[1].dtype)
        for some in _steps(at.hidden[0].shape[1]):
            total = scratch[0][:, some]
            if at.heads[0].axis == 0:
                out[0][:, some] = total.astype(out[0].dtype)
            else:
                out[0][some] = total.T.astype(out[0].dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradients(
    interpret: Any, sweep: Sweep, operands: Operands, residuals: Any, cotangents: Any, counts: Any
) -> tuple[jax.Array, Head]:
    tree = (operands.tokens, residuals, cotangents, counts)
    student = operands.student
    dtype, width = sum_dtype(student), student.hidden.shape[1]

    def sums(size: int, out: Any) -> int:
        # The sum, and twice what is written of it.
        return size * width * (dtype.itemsize + 2 * jnp.dtype(out).itemsize)

    hidden, head = student.hidden, student.head
    grid = _grid(sweep, operands, tree, "hidden", held=lambda r, c: sums(r, hidden.dtype))
    (d_hidden,) = grid.call(
        functools.partial(_of_hidden, sweep, grid),
        [(grid.by_row(-1, width), (hidden.shape, hidden.dtype))],
        [((grid.tiles.rows, width), dtype)],
        1,
        interpret,
    )
    grid = _grid(
        sweep, operands, tree, "head", held=lambda r, c: sums(c, head.kernel.dtype), rows_axis=1
    )
    spec, scratch = grid.head_specs(grid.inputs.heads[0]), [((grid.tiles.columns, width), dtype)]
    out = [(spec.kernel, (head.kernel.shape, head.kernel.dtype))]
    if head.bias is not None:
        out.append((spec.bias, ((1, grid.vocab), head.bias.dtype)))
        scratch.append(((1, grid.tiles.columns), dtype))
    kernel, *bias = grid.call(functools.partial(_of_head, sweep, grid), out, scratch, 1, interpret)
    return d_hidden, dataclasses.replace(head, kernel=kernel, bias=bias[0][0] if bias else None)


@_gradients.defjvp
def _gradients_jvp(interpret: Any, sweep: Sweep, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(blockwise_gradients, sweep), primals, tangents)


def _product(hidden: Any, kernel: Any, axis: int) -> jax.Array:
    """Logits of a tile, a slice of the hidden axis at a time: what is sliced is copied."""
    parts = []
    for some in _steps(hidden.shape[1]):
        w = kernel[:, some] if axis == 0 else kernel[some]
        parts.append(contract(hidden[:, some], (1,), w, (1 - axis,)))
    return functools.reduce(jnp.add, parts)
