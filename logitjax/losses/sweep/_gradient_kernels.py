import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from logitjax.losses.sweep import _engine as engine
from logitjax.losses.sweep._engine import Operands, Projection, Sweep
from logitjax.losses.sweep._head import Head
from logitjax.losses.sweep._kernel_inputs import Inputs
from logitjax.losses.sweep._tiles import Grid, hidden_steps, tile_grid


def _slope(sweep: Sweep, grid: Grid, at: Inputs) -> tuple[jax.Array, jax.Array]:
    """Gradient of a tile's logits before the bias, and whether positions count, `[T, 1]`."""
    (tokens, residuals, cotangents, counts), here = grid.read(at)
    counts = counts[:, None] != 0
    block = grid.block(at, here, tokens)
    raw = sweep.statistic.gradient(residuals, cotangents, block)
    side = Projection(at.hidden[0], here.heads[0], here.scales[0])
    return engine.raw_gradient(side, block, raw, counts), counts


def _of_hidden(sweep: Sweep, grid: Grid, at: Inputs, out: Any, scratch: Any) -> None:
    """Kernel that sums the gradient of hidden states over tiles of the vocabulary."""
    (total,), (result,), tile = scratch, out, pl.program_id(1)
    kernel, axis = at.heads[0].kernel, at.heads[0].axis
    raw = _slope(sweep, grid, at)[0].astype(kernel.dtype)

    @pl.when(tile == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def add(exists: Any) -> None:
        for some in hidden_steps(at.hidden[0].shape[1]):
            w = kernel[:, some] if axis == 0 else kernel[some]
            if exists is not None:
                w = jnp.where(exists, w, jnp.zeros((), w.dtype))
            total[:, some] += engine.contract(raw, (1,), w, (axis,))

    # Values past the end of the vocabulary are arbitrary, and zero times them may be nan.
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


def _of_head(sweep: Sweep, grid: Grid, at: Inputs, out: Any, scratch: Any) -> None:
    """Kernel that sums the gradient of the head over tiles of positions."""
    tile, hidden = pl.program_id(1), at.hidden[0]
    raw, counts = _slope(sweep, grid, at)
    cast = raw.astype(at.heads[0].kernel.dtype)

    @pl.when(tile == 0)
    def _() -> None:
        for total in scratch:
            total[...] = jnp.zeros_like(total)

    def add(counts: Any) -> None:
        for some in hidden_steps(at.hidden[0].shape[1]):
            x = hidden[:, some]
            if counts is not None:
                x = jnp.where(counts, x, jnp.zeros((), x.dtype))
            scratch[0][:, some] += engine.contract(cast, (0,), x, (0,))

    # As above, for hidden states of unused positions.
    all_count = jnp.min(jnp.where(counts, 1.0, 0.0)) > 0
    lax.cond(all_count, lambda: add(None), lambda: add(counts))
    if len(out) == 2:
        scratch[1][...] += raw.sum(0, keepdims=True)

    @pl.when(tile == grid.shape[1] - 1)
    def _() -> None:
        if len(out) == 2:
            out[1][...] = scratch[1][...].astype(out[1].dtype)
        for some in hidden_steps(at.hidden[0].shape[1]):
            total = scratch[0][:, some]
            if at.heads[0].axis == 0:
                out[0][:, some] = total.astype(out[0].dtype)
            else:
                out[0][some] = total.T.astype(out[0].dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def tile_gradients(
    interpret: Any, sweep: Sweep, operands: Operands, residuals: Any, cotangents: Any, counts: Any
) -> tuple[jax.Array, Head]:
    tree = (operands.tokens, residuals, cotangents, counts)
    student = operands.student
    dtype, width = engine.sum_dtype(student), student.hidden.shape[1]

    def sums(size: int, out: Any) -> int:
        # The sum, and twice the output.
        return size * width * (dtype.itemsize + 2 * jnp.dtype(out).itemsize)

    hidden, head = student.hidden, student.head
    grid = tile_grid(sweep, operands, tree, "hidden", extra=lambda r, c: sums(r, hidden.dtype))
    (d_hidden,) = grid.call(
        functools.partial(_of_hidden, sweep, grid),
        [(grid.by_row(-1, width), (hidden.shape, hidden.dtype))],
        [((grid.tiles.rows, width), dtype)],
        1,
        interpret,
    )
    grid = tile_grid(
        sweep, operands, tree, "head", extra=lambda r, c: sums(c, head.kernel.dtype), rows_axis=1
    )
    spec, scratch = grid.head_specs(grid.inputs.heads[0]), [((grid.tiles.columns, width), dtype)]
    out = [(spec.kernel, (head.kernel.shape, head.kernel.dtype))]
    if head.bias is not None:
        out.append((spec.bias, ((1, grid.vocab), head.bias.dtype)))
        scratch.append(((1, grid.tiles.columns), dtype))
    kernel, *bias = grid.call(functools.partial(_of_head, sweep, grid), out, scratch, 1, interpret)
    return d_hidden, dataclasses.replace(head, kernel=kernel, bias=bias[0][0] if bias else None)


@tile_gradients.defjvp
def _gradients_jvp(interpret: Any, sweep: Sweep, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(engine.blockwise_gradients, sweep), primals, tangents)
