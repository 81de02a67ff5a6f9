"""The engine `pallas`: a sweep by kernels, for any statistic with `in_tiles`.

A program of the grid has a tile of positions and a tile of the vocabulary on chip, forms their
logits, and calls `Statistic.absorb`, or `Statistic.gradient`, on them, traced inside the kernel. On
a TPU (Mosaic) one kernel accumulates the state of a tile of positions over tiles of the vocabulary,
and there is one kernel for each gradient, because each is a sum over the axis that the other is
tiled by. On CPU these kernels are interpreted, for tests. There are none for GPUs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from logitjax.losses.sweep._bins import Binned, settle
from logitjax.losses.sweep._engine import Operands, Sweep, swept
from logitjax.losses.sweep._gradient_kernels import tile_gradients
from logitjax.losses.sweep._head import Head
from logitjax.losses.sweep._readout import ReadoutStatistic
from logitjax.losses.sweep._state_kernel import tpu_state
from logitjax.losses.sweep._statistic import Statistic

# Interpreter options; tests make it look for races.
INTERPRET: Any = True


def kernels(platform: str, statistic: Statistic) -> dict[str, Callable[..., Any] | None]:
    """Choose kernels for the halves of a `Sweep`; None where the blocks of `scan` are used."""
    interpret = INTERPRET if platform == "cpu" else False
    backward = _partial(gradients, interpret) if statistic.gradient_in_tiles else None
    return {"forward": _partial(forward, interpret), "gradients": backward}


# Equal partials must be identical, because a sweep is a static argument.
_partial = functools.cache(functools.partial)


def flat(operands: Operands, *trees: Any) -> Any:
    """Flatten to one axis of positions; also return a function that restores batch shapes."""
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


def forward(interpret: Any, sweep: Sweep, operands: Operands) -> Any:
    """Run all passes of the statistic, like `swept`: outputs and residuals, `[*batch, ...]`."""
    operands, restore = flat(operands)
    return restore(_passes(interpret, sweep, operands))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _passes(interpret: Any, sweep: Sweep, operands: Operands) -> Any:
    statistic, outputs, passed = sweep.statistic, None, None
    for _ in range(statistic.passes):
        if isinstance(statistic, ReadoutStatistic) and statistic.k:
            binned = Binned.of(statistic)
            summed = dataclasses.replace(sweep, statistic=binned)
            state = settle(sweep, operands, binned, tpu_state(interpret, summed, operands, passed))
        else:
            state = tpu_state(interpret, sweep, operands, passed)
        if sweep.axis_name is not None:
            state = statistic.reduce(state, sweep.axis_name, passed)
        outputs, passed = statistic.finish(state, passed)
    return outputs, passed


@_passes.defjvp
def _passes_jvp(interpret: Any, sweep: Sweep, primals: Any, tangents: Any) -> Any:
    """Form the same sums by blocks, for second derivatives, which kernels do not have."""
    return jax.jvp(functools.partial(swept, sweep), primals, tangents)


def gradients(interpret: Any, sweep: Sweep, *arrays: Any) -> tuple[jax.Array, Head]:
    """Form the gradients of `blockwise_gradients` by kernels."""
    operands, residuals, cotangents, counts, restore = flat(*arrays)
    d_hidden, d_head = tile_gradients(interpret, sweep, operands, residuals, cotangents, counts)
    return restore(d_hidden), d_head
