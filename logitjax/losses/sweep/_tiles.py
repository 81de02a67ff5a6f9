"""Tiles of a kernel: their numbers of positions and columns, and a program's inputs."""

import dataclasses
import functools
import json
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from logitjax.losses.sweep._bins import Binned
from logitjax.losses.sweep._engine import Operands, Sweep, compute_dtype, contract, finished_logits
from logitjax.losses.sweep._head import Head
from logitjax.losses.sweep._ids import NOWHERE
from logitjax.losses.sweep._kernel_inputs import Inputs, Packed, cost, make_inputs, shape_of
from logitjax.losses.sweep._statistic import LogitBlock

# Three quarters of the smallest on-chip memory of v5e, v5p, v6e and TPU7x: 64 MiB per core. A
# quarter of a kernel's share, at least so much, is for what tile sizes do not show.
_ON_CHIP, _LEAST_SPARE = 48 * 2**20, 4 * 2**20
# As many of the resident axis as fit: each byte that streams by takes part in so many products.
_ROWS = (1024, 512, 256, 128)
_COLUMNS = (2048, 1024, 512, 256, 128)
LANES = 128
# Live float32 arrays of the size of a tile of logits.
_TILE_ARRAYS = 5
# Size of the slices of the hidden axis that are copied out of a tile for the product.
_STEP = 512


class Tiles(NamedTuple):
    """Positions and columns of a program of the grid, and the on-chip bytes that it needs."""

    rows: int
    columns: int
    on_chip: int


def choose_tiles(
    positions: int,
    vocab: int,
    on_chip: Callable[[int, int], int],
    sizes: list[tuple[int, int]],
    *,
    multiple: int = LANES,
) -> Tiles:
    """Choose the first of `sizes`, rows and columns, whose `on_chip(rows, columns)` bytes fit."""
    for r, c in sizes:
        if (size := on_chip(r, c)) <= _ON_CHIP:
            r = min(r, -(-positions // 32) * 32)
            return Tiles(r, min(c, -(-vocab // multiple) * multiple), size)
    raise ValueError(
        "blocks.engine: expected 'scan' or 'rows' for hidden states that are too wide for a tile, "
        "got 'pallas'"
    )


class Grid(NamedTuple):
    """A kernel over tiles of positions and of columns, which streams along its second axis."""

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
        inputs = self.inputs
        return Inputs(
            hidden=[self.by_row(-1, x.shape[1]) for x in inputs.hidden],
            rows=[self.by_row(x.shape[0], -1) for x in inputs.rows],
            wide=[self.by_row(-1, x.shape[1]) for x in inputs.wide],
            heads=[self.head_specs(head) for head in inputs.heads],
            where=None if inputs.where is None else self.by_column(1, -1),
            scales=[once for _ in inputs.scales],
            start=once,
        )

    def read(self, at: Inputs) -> tuple[Any, Inputs]:
        """Read the values of the tile's positions, and its small arrays."""
        heads = [dataclasses.replace(head, kernel=None) for head in at.heads]
        here = jax.tree.map(lambda ref: ref[...], at._replace(hidden=None, heads=heads))
        columns = [x.T for x in here.rows]
        return self.packed.unpack(
            lambda array, n: columns[array][:, n], here.wide.__getitem__
        ), here

    def block(self, at: Inputs, here: Inputs, tokens: Any) -> LogitBlock:
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
        # Ids past the end of a shard belong to the next one.
        ids = jnp.where(ids < self.vocab, here.start + ids, NOWHERE)
        # Tiles do not repeat columns, and few have more than one id of a position.
        return LogitBlock(sides[0], teacher, ids, 0, tokens, together=1)

    def call(
        self, kernel: Callable[..., None], out: Any, scratch: Any, products: int, interpret: Any
    ) -> Any:
        """Call `kernel(inputs, outputs, scratch)` over the grid; `out` has specs and shapes."""
        arrays, layout = jax.tree.flatten(self.inputs)
        specs, shapes = zip(*out, strict=True)
        ends = (len(arrays), len(arrays) + len(out))
        # Resident arrays are read once, streamed ones for every resident tile, unless they have a
        # single tile, which remains too.
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
            # Sums remain on chip while the other axis streams by.
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=self.tiles.on_chip + max(self.tiles.on_chip // 3, _LEAST_SPARE),
            ),
            interpret=interpret,
            name=f"logitjax_{self.name}_{self.tiles.rows}x{self.tiles.columns}",
        )(*arrays)


def tile_grid(
    sweep: Sweep,
    operands: Operands,
    tree: Any,
    name: str,
    *,
    extra: Callable[[int, int], int],
    rows_axis: int = 0,
) -> Grid:
    """Choose a kernel's inputs and tiles; `extra` gives the bytes of its sums and outputs.

    Tiles are looked up in `tiles.json`, by chip, kernel and bytes of a hidden state, or else follow
    from sizes. An empty list there means that the compiler refused.
    """
    packed = Packed(tree)
    positions, vocab = operands.student.hidden.shape[0], operands.student.head.vocab_size()
    widths = [side.hidden.shape[1] * compute_dtype(side).itemsize for side in operands.sides]
    # Packed arrays also exist unpacked, with one number per row of lanes.
    row_bytes = sum(4 * n + 4 * LANES for n in packed.counts)
    row_bytes += sum(4 * -(-n // LANES) * LANES for n in packed.widths)

    def on_chip(rows: int, columns: int) -> int:
        # Streamed tiles are double-buffered.
        moved = sum(2 * (rows + columns) * width for width in widths)
        logits = _TILE_ARRAYS * 4 * rows * columns * len(widths)
        copied = (rows + columns) * max(min(width, 4 * _STEP) for width in widths)
        return moved + logits + copied + 2 * rows * row_bytes + extra(rows, columns)

    multiple = sweep.statistic.bins if isinstance(sweep.statistic, Binned) else LANES
    columns = [-(-size // multiple) * multiple for size in _COLUMNS]
    sizes = [(r, c) for r in _ROWS for c in columns]
    if rows_axis == 1:
        # More columns save no more time, and leave no room for rows.
        sizes = [(r, c) for c in columns for r in _ROWS if c <= 1024]
    # Narrower products do not fill a matrix unit.
    sizes.sort(key=lambda size: min(size) < 256)
    if multiple == LANES and (existing := _known_tiles(name, widths)) is not None:
        sizes = [*existing, *sizes] if existing else []
    tiles = choose_tiles(positions, vocab, on_chip, sizes, multiple=multiple)
    length = -(-positions // tiles.rows) * tiles.rows
    inputs = make_inputs(sweep, operands, packed, tree, length)
    return Grid(name, packed, inputs, tiles, rows_axis, vocab)


def _known_tiles(name: str, widths: list[int]) -> list[tuple[int, int]] | None:
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    key = f"{device.device_kind}, {name}, {' + '.join(map(str, widths))}"
    return _table().get(key)


@functools.cache
def _table() -> dict[str, list[tuple[int, int]]]:
    table = json.loads((resources.files("logitjax.losses.sweep") / "tiles.json").read_text())
    return {key: [(rows, columns) for rows, columns in sizes] for key, sizes in table.items()}


def hidden_steps(width: int) -> list[slice]:
    """Slices of the hidden axis to read at a time, which are copied out of a tile."""
    step = _STEP if width % LANES == 0 else width
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def _product(hidden: Any, kernel: Any, axis: int) -> jax.Array:
    """Compute the logits of a tile in slices of the hidden axis, which are copied."""
    parts = []
    for some in hidden_steps(hidden.shape[1]):
        w = kernel[:, some] if axis == 0 else kernel[some]
        parts.append(contract(hidden[:, some], (1,), w, (1 - axis,)))
    return functools.reduce(jnp.add, parts)
