"""From the arguments of a ``linear_*`` function to a sweep: checks, block sizes, meshes."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from logitjax import ops
from logitjax.losses.sweep._engine import (
    Operands,
    Projection,
    Statistic,
    Sweep,
    run,
    vary,
    varying_axes,
)
from logitjax.losses.sweep._weighted import run_weighted
from logitjax.ops import Array, AxisName

# Elements of logits that a block may hold. On CPU a block should stay near the caches; on an
# accelerator it should be large enough that a matmul fills the chip.
_BLOCK_ELEMENTS = {"cpu": 2**22}
_BLOCK_ELEMENTS_ELSEWHERE = 2**26
# The scalar form keeps whole rows of logits for so many elements, and never fewer than these rows:
# each block of them reads the heads and reads and writes the head's gradient once.
_ROW_ELEMENTS = {"cpu": 40_000_000}
_ROW_ELEMENTS_ELSEWHERE = 2**28
_LEAST_ROWS = 256


class Branch(NamedTuple):
    """One side of a loss as the caller gave it."""

    hidden: Array
    head: Array
    bias: Array | None = None
    vocab_axis: int | None = None
    soft_cap: float | None = None
    prefix: str = ""


def resolve_vocab_axis(branch: Branch) -> int:
    """The head's vocabulary axis; inferred from the shapes where that is unambiguous."""
    hidden, head = jnp.shape(branch.hidden), jnp.shape(branch.head)
    name = f"{branch.prefix}head"
    if len(head) != 2 or not hidden:
        raise ValueError(
            f"{name} must have two axes and {branch.prefix}hidden at least one, got shapes {head} "
            f"and {hidden}"
        )
    size = hidden[-1]
    axis = branch.vocab_axis
    if axis is None:
        if head[0] == head[1] == size:
            raise ValueError(
                f"{name} of shape {head} is square: give {branch.prefix}vocab_axis (1 for "
                "[hidden, vocab], 0 for [vocab, hidden])"
            )
        axis = 1 if head[0] == size else 0
    if axis not in (0, 1):
        raise ValueError(f"{branch.prefix}vocab_axis must be 0 or 1, got {axis}")
    if head[1 - axis] != size:
        raise ValueError(
            f"{name} of shape {head} does not fit {branch.prefix}hidden, whose last axis has "
            f"{size} entries"
        )
    return axis


def vocabulary_size(branch: Branch, axis_name: AxisName | None) -> int:
    """Entries of the whole vocabulary, all shards together."""
    size = jnp.shape(branch.head)[resolve_vocab_axis(branch)]
    return size if axis_name is None else size * lax.axis_size(axis_name)


def _projection(branch: Branch, axis: int, inverse_temperature: jax.Array) -> Projection:
    arrays: dict[str, Any] = {}
    for name in ("hidden", "head", "bias"):
        value = getattr(branch, name)
        if value is not None:
            value = jnp.asarray(value)
            if not jnp.issubdtype(value.dtype, jnp.floating):
                raise TypeError(f"{branch.prefix}{name} must be floating point, got {value.dtype}")
        arrays[name] = value
    vocab = arrays["head"].shape[axis]
    if arrays["bias"] is not None and arrays["bias"].shape != (vocab,):
        raise ValueError(
            f"{branch.prefix}bias must have shape ({vocab},), got {arrays['bias'].shape}"
        )
    if branch.soft_cap is not None:
        ops.check_positive(branch.soft_cap, f"{branch.prefix}soft_cap")
    return Projection(**arrays, inverse_temperature=inverse_temperature)


def _block_size(given: int | None, rows: int, vocab: int) -> int:
    """Columns a block, where a block has `rows` positions or head rows, whichever are more."""
    if given is not None:
        ops.check_positive(given, "block_size")
        return min(given, vocab)
    budget = _BLOCK_ELEMENTS.get(jax.default_backend(), _BLOCK_ELEMENTS_ELSEWHERE)
    most = max(512, budget // max(rows, 1))
    # Equal blocks, so that the last one repeats few columns, and whole vector registers.
    count = -(-vocab // most)
    return min(vocab, -(-math.ceil(vocab / count) // 128) * 128)


def _token_block(given: int | None, batch: tuple[int, ...], vocab: int, weighted: bool):
    """Positions along the last batch axis taken together; None for all of them."""
    if given is not None:
        ops.check_positive(given, "token_block")
        return given
    if not batch:
        return None
    lead = max(1, math.prod(batch[:-1]))
    backend = jax.default_backend()
    if weighted:
        budget = _ROW_ELEMENTS.get(backend, _ROW_ELEMENTS_ELSEWHERE)
        most = max(_LEAST_ROWS, budget // vocab)
    else:
        most = _BLOCK_ELEMENTS.get(backend, _BLOCK_ELEMENTS_ELSEWHERE) // min(vocab, 512)
    most = max(1, most // lead)
    if batch[-1] <= most:
        return None
    count = -(-batch[-1] // most)
    return -(-batch[-1] // count)


def sweep(
    statistic: Callable[[Any], Statistic],
    student: Branch,
    teacher: Branch | None = None,
    *,
    tokens: Mapping[str, Any] | None = None,
    temperature: Any = 1.0,
    vocab_where: Array | None = None,
    combine: Callable[[Any, Any], jax.Array] | None = None,
    token_weights: Array | None = None,
    block_size: int | None = None,
    token_block: int | None = None,
    axis_name: AxisName | None = None,
) -> Any:
    """Run a sweep: the statistic's outputs, or the losses that ``combine`` makes of them.

    ``statistic`` is made from the dtype of the accumulators; ``combine(outputs, tokens)`` gives
    losses ``[*batch]``. With ``token_weights``: the weighted sum of the losses, and the outputs
    without a gradient.
    """
    ops.check_positive(temperature, "temperature")
    branches = [student] if teacher is None else [student, teacher]
    axes = tuple(resolve_vocab_axis(branch) for branch in branches)
    scale = lax.stop_gradient(1.0 / jnp.asarray(temperature, jnp.float32))
    sides = [_projection(branch, axis, scale) for branch, axis in zip(branches, axes)]
    batch, vocab = sides[0].hidden.shape[:-1], sides[0].head.shape[axes[0]]
    if teacher is not None:
        sides[1] = lax.stop_gradient(sides[1])
        if sides[1].hidden.shape[:-1] != batch:
            raise ValueError(
                f"teacher_hidden must have the batch shape of hidden, {batch}, got "
                f"{sides[1].hidden.shape[:-1]}"
            )
        if sides[1].head.shape[axes[1]] != vocab:
            raise ValueError(
                f"teacher_head must have the vocabulary of head, {vocab} entries, got "
                f"{sides[1].head.shape[axes[1]]}: cut or pad one of them and exclude the padding "
                "with vocab_where"
            )
    if vocab_where is not None:
        vocab_where = jnp.asarray(vocab_where)
        if vocab_where.dtype != jnp.bool_ or vocab_where.shape != (vocab,):
            raise ValueError(
                f"vocab_where must be boolean with shape ({vocab},), got "
                f"{vocab_where.dtype}{vocab_where.shape}"
            )
    tokens = lax.stop_gradient(jax.tree.map(jnp.asarray, dict(tokens or {})))
    for path, value in jax.tree_util.tree_leaves_with_path(tokens):
        if value.shape[: len(batch)] != batch:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"{name} must start with the batch shape of hidden, {batch}, got {value.shape}"
            )
    weighted = token_weights is not None
    wide = jnp.promote_types(
        jnp.result_type(sides[0].hidden.dtype, sides[0].head.dtype), jnp.float32
    )
    operands = Operands(sides[0], sides[1] if teacher is not None else None, vocab_where, tokens)
    if weighted:
        token_weights = jnp.asarray(token_weights)
        if token_weights.shape != batch:
            raise ValueError(
                f"token_weights must have the batch shape of hidden, {batch}, got "
                f"{token_weights.shape}"
            )
        token_weights = token_weights.astype(wide)

    def local(operands: Operands, token_weights: Array | None, axis_name: AxisName | None) -> Any:
        """Of the rows and columns that are here: all of them, or a device's."""
        batch = operands.student.hidden.shape[:-1]
        vocab = operands.student.head.shape[axes[0]]
        positions = _token_block(token_block, batch, vocab, weighted)
        length = batch[-1] if batch else 1
        together = math.prod(batch) // max(length, 1) * min(positions or length, length)
        widths = [side.hidden.shape[-1] for side in sides]
        varying = _varying((operands, token_weights), axis_name)
        config = Sweep(
            statistic=statistic(wide),
            vocab_axes=axes,
            soft_caps=tuple(branch.soft_cap for branch in branches),
            block=_block_size(block_size, max(together, *widths), vocab),
            token_block=positions,
            axis_name=axis_name,
            varying=varying,
            combine=combine,
        )
        # Outside the custom rule, so that the transpose sums the gradients of replicated arrays.
        operands, token_weights = jax.tree.map(
            lambda x: vary(x, varying), (operands, token_weights)
        )
        outputs = _on_explicit_mesh(config, operands, token_weights)
        if axis_name is None:
            return outputs
        return jax.tree.map(lambda x: lax.psum(x, axis_name), outputs)

    if axis_name is None:
        outputs = _on_auto_mesh(local, operands, token_weights, axes)
    else:
        outputs = local(operands, token_weights, axis_name)
    if weighted:
        return outputs[0], lax.stop_gradient(outputs[1])
    if combine is None:
        return outputs
    return combine(outputs, tokens)


def _varying(tree: Any, axis_name: AxisName | None) -> tuple[str, ...]:
    """Mesh axes over which anything here differs, vocabulary shards included."""
    axes = {a for x in jax.tree.leaves(tree) for a in varying_axes(x)}
    if axis_name is not None and axes:
        axes |= {axis_name} if isinstance(axis_name, str) else set(axis_name)
    return tuple(sorted(axes))


def _on_auto_mesh(
    local: Callable[..., Any],
    operands: Operands,
    weights: Array | None,
    vocab_axes: tuple[int, ...],
) -> Any:
    """Every device sweeps its own rows and columns, where the mesh they are split over is known.

    Left alone the compiler gathers a block of the head, and sums its gradient over all devices,
    once for every block of positions; so it does both once a sweep.
    """
    mesh = jax.sharding.get_abstract_mesh()
    hidden, head = operands.student.hidden, operands.student.head

    def dividing(names: tuple[str, ...], size: int) -> tuple[str, ...]:
        return tuple(name for name in ops.auto_axes(names, size) if mesh.shape[name] > 1)

    rows = dividing(ops.BATCH_AXES, hidden.shape[0]) if hidden.ndim > 1 else ()
    columns = dividing(ops.VOCABULARY_AXES, head.shape[vocab_axes[0]])
    if not rows + columns:
        return local(operands, weights, None)
    # Where arrays lie, in the place of arrays.
    spec: Any = PartitionSpec
    by_row, by_column, whole = spec(rows), spec(columns), spec()

    def side(axis: int) -> Projection:
        by_axis = spec(*(columns if i == axis else None for i in range(2)))
        return Projection(by_row, by_axis, by_column, whole)

    def mine(operands: Operands, weights: Array | None) -> Any:
        outputs = local(operands, weights, columns or None)
        return outputs if weights is None else (lax.psum(outputs[0], rows), outputs[1])

    sides = [side(axis) for axis in vocab_axes]
    teacher = sides[1] if len(sides) == 2 else whole
    # All axes where the others have one device: a part of a mesh is harder on the compiler.
    alone = mesh.size == math.prod(mesh.shape[name] for name in rows + columns)
    everywhere = jax.shard_map(
        mine,
        in_specs=(Operands(sides[0], teacher, by_column, by_row), by_row),
        out_specs=by_row if weights is None else (whole, by_row),
        axis_names=set(mesh.axis_names if alone else rows + columns),
    )
    return everywhere(operands, weights)


def _on_explicit_mesh(config: Sweep, operands: Operands, weights: Array | None) -> Any:
    """The sweep itself; Explicit mesh axes are left to the compiler inside it."""

    def call(operands, weights):
        if weights is None:
            return run(config, operands)
        return run_weighted(config, operands, weights)

    sharding = jax.typeof(operands.student.hidden).sharding
    mesh = sharding.mesh
    explicit = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit
    )
    if not explicit:
        return call(operands, weights)
    axis = config.vocab_axes[0]
    split = jax.typeof(operands.student.head).sharding.spec
    if len(split) == 2 and split[axis] is not None:
        raise ValueError(
            f"head is sharded over {split[axis]!r} along its vocabulary: give "
            f"axis_name={split[axis]!r} inside jax.shard_map"
        )
    batch = tuple(sharding.spec[:-1])
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (operands, weights))
    shapes = jax.eval_shape(call, *plain)

    def layout(x: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(batch + (None,) * x.ndim)[: x.ndim]))

    out = jax.tree.map(layout, shapes)
    inside: Any = jax.sharding.auto_axes(call, axes=explicit, out_sharding=out)
    return inside(operands, weights)
