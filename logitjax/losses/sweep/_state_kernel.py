import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from logitjax.losses.sweep._engine import Operands, Sweep, sum_dtype
from logitjax.losses.sweep._kernel_inputs import Inputs, Packed
from logitjax.losses.sweep._tiles import LANES, tile_grid


def tpu_state(interpret: Any, sweep: Sweep, operands: Operands, passed: Any) -> Any:
    """Compute the statistic's state after all columns, `[T]`."""
    dtype, positions = sum_dtype(operands.student), operands.student.hidden.shape[0]
    like = jax.eval_shape(lambda p: sweep.statistic.start((positions,), dtype, p), passed)
    state = Packed(like)
    widths = [math.prod(x.shape[1:]) for x in jax.tree.leaves(like)]
    # The state, which fills rows of lanes, and twice the output.
    row_bytes = sum(3 * 4 * -(-n // LANES) * LANES for n in widths)
    tree = (operands.tokens, passed)
    grid = tile_grid(sweep, operands, tree, "state", extra=lambda r, c: r * row_bytes)
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

        items = [
            ref[...] if x.ndim != 1 else ref[:, 0]
            for ref, x in zip(scratch, jax.tree.leaves(like), strict=True)
        ]
        items = jax.tree.unflatten(jax.tree.structure(like), items)
        store(sweep.statistic.absorb(items, grid.block(at, here, tokens), before))

        @pl.when(tile == grid.shape[1] - 1)
        def _() -> None:
            refs = [ref for ref, x in zip(scratch, jax.tree.leaves(like)) if x.ndim != 1]
            for ref, wide in zip(out[len(state.kinds) :], refs, strict=True):
                ref[...] = wide[...]
            narrow = [ref for ref, x in zip(scratch, jax.tree.leaves(like)) if x.ndim == 1]
            for kind, count, ref in zip(state.kinds, state.counts, out):
                some = [x[...] for x in narrow if x.dtype == kind]
                empty = jnp.zeros((rows, count - len(some)), kind)
                # Arrays on chip have no empty axes, so the padding is left out if there is none.
                ref[...] = jnp.concatenate([*some, empty][:count], 1).T

    out = [
        (grid.by_row(n, -1), ((n, length), kind))
        for n, kind in zip(state.counts, state.kinds, strict=True)
    ] + [
        (grid.by_row(-1, n), ((positions, n), kind))
        for n, kind in zip(state.widths, state.wide_kinds, strict=True)
    ]
    scratch = [((rows, n), x.dtype) for n, x in zip(widths, jax.tree.leaves(like), strict=True)]
    result = grid.call(kernel, out, scratch, 0, interpret)
    wide = result[len(state.kinds) :]
    return state.unpack(lambda array, n: result[array][n, :positions], wide.__getitem__)
