"""Sweeps from the arguments of a `linear_*` function: checks, block sizes, meshes."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float

from logitjax import ops
from logitjax.losses.sweep import _engine as engine
from logitjax.losses.sweep._blocks import Blocks, Sizes
from logitjax.losses.sweep._engine import Operands, Projection, Sweep
from logitjax.losses.sweep._head import Head
from logitjax.losses.sweep._statistic import Statistic
from logitjax.losses.sweep._weighted import run_weighted, weighted_sum
from logitjax.ops import Array, AxisName, Number

# A TPU reads single numbers one at a time. Each id costs three operations per logit; with this many
# the sweep is no longer memory-bound.
_IDS_TOGETHER = 4


class Options(TypedDict, total=False):
    """Keywords that losses of hidden states and heads pass on to `run`, which documents them."""

    temperature: Number
    vocab_where: Any
    weights: Any
    blocks: Blocks | None
    axis_name: AxisName | None


def weighted_or_each(statistic: Statistic, *arrays: Any, **options: Any) -> jax.Array:
    """Call `run` for a loss: values of each position, or with weights only the sum."""
    loss = run(statistic, *arrays, **options)
    return loss if options.get("weights") is None else loss[0]


def run(
    statistic: Statistic,
    hidden: Float[Array, "*batch hidden"],
    head: Head | Float[Array, "rows columns"],
    *,
    teacher: tuple[Any, Any] | None = None,
    tokens: Mapping[str, Any] | None = None,
    temperature: Number = 1.0,
    vocab_where: Bool[Array, " vocab"] | None = None,
    weights: Float[Array, "*batch"] | None = None,
    blocks: Blocks | None = None,
    axis_name: AxisName | None = None,
) -> Any:
    """Sum a statistic over the vocabulary of a linear head, block by block.

    Differentiable with respect to hidden states and head, in reverse mode; so is the gradient, so
    that `grad` of `grad` gives second derivatives. If weights of the positions are known and there
    is memory for `rows` (see `Blocks`), the gradient is formed in the same sweep as the value and
    no logit is formed twice. A position whose weight or cotangent is zero adds nothing, even if its
    hidden states are nan. Other arguments and errors are documented in `logitjax.losses`.

    Args:
        statistic: the statistic to sum; static.
        teacher: the hidden states, `[*batch, teacher_hidden]`, and the head of a teacher with the
            same vocabulary; neither gets a gradient.
        tokens: named arrays `[*batch, ...]` that the statistic reads; they get no gradient.

    Returns:
        The statistic's outputs, through its `losses` method. With `weights`: the scalar
        `sum(weights * losses)`, and the outputs without a gradient.
    """
    ops.checks.positive(temperature, "temperature")
    operands = _operands((hidden, head), teacher, tokens, temperature, vocab_where)
    batch = operands.student.hidden.shape[:-1]
    if weights is not None:
        weights = jnp.asarray(weights)
        ops.checks.shapes(weights=(weights, "float *batch"))
        if weights.shape != batch:
            raise ValueError(
                f"weights: expected the batch shape of hidden, {batch}, got {weights.shape}"
            )
        weights = weights.astype(engine.sum_dtype(operands.student))
    # Outside shard_map, where arrays still know their devices.
    platform = ops.mesh.platform_of(operands.student.hidden, operands.student.head.kernel)
    local = (statistic, Blocks() if blocks is None else blocks, platform)
    # By itself the compiler gathers a block of the head, and sums its gradient over all devices,
    # once per block of positions; with a known mesh every device sweeps its own rows and columns,
    # and it does both once per sweep. Inside the caller's `shard_map` arrays are already split.
    mesh = _mesh_of(operands.student.head.kernel, operands.student.hidden)
    split = None if axis_name is not None else _split(mesh, *operands.student[:2])
    if split is None:
        outputs = _local(*local, operands, weights, axis_name)
    else:
        # Outside jit each of its operations would be a program over the mesh.
        outputs = _everywhere(local, mesh, split, operands, weights)
    if weights is not None:
        return outputs[0], lax.stop_gradient(outputs[1])
    return _losses(statistic, len(batch), outputs, operands.tokens)


def _operands(
    student: tuple[Any, Any],
    teacher: tuple[Any, Any] | None,
    tokens: Mapping[str, Any] | None,
    temperature: Number,
    vocab_where: Array | None,
) -> Operands:
    """Check the inputs of a sweep; only the student gets a gradient."""
    side = _projection("hidden", *student, temperature)
    batch, vocab = side.hidden.shape[:-1], side.head.vocab_size()
    if not math.prod(batch):
        raise ValueError(f"hidden: expected at least one position, got shape {side.hidden.shape}")
    if not vocab:
        shape = side.head.kernel.shape
        raise ValueError(f"head: expected at least one entry of the vocabulary, got shape {shape}")
    other = None
    if teacher is not None:
        other = lax.stop_gradient(_projection("teacher_hidden", *teacher, temperature))
        if other.hidden.shape[:-1] != batch:
            raise ValueError(
                f"teacher_hidden: expected the batch shape of hidden, {batch}, got "
                f"{other.hidden.shape[:-1]}"
            )
        if other.head.vocab_size() != vocab:
            raise ValueError(
                f"teacher_head: expected the vocabulary of head, {vocab} entries, got "
                f"{other.head.vocab_size()}: cut or pad one of them and exclude the padding "
                "with vocab_where"
            )
    if vocab_where is not None:
        vocab_where = jnp.asarray(vocab_where)
        if vocab_where.dtype != jnp.bool_ or vocab_where.shape != (vocab,):
            raise ValueError(
                f"vocab_where: expected a boolean mask of shape ({vocab},), got "
                f"{vocab_where.dtype}{vocab_where.shape}"
            )
    tokens = lax.stop_gradient(jax.tree.map(jnp.asarray, dict(tokens or {})))
    for path, value in jax.tree_util.tree_leaves_with_path(tokens):
        if value.shape[: len(batch)] != batch:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"{name}: expected a shape that starts with the batch shape of hidden, {batch}, "
                f"got {value.shape}"
            )
    return Operands(side, other, vocab_where, tokens)


def _local(
    statistic: Statistic,
    blocks: Blocks,
    platform: str,
    operands: Operands,
    weights: Array | None,
    axis_name: AxisName | None,
) -> Any:
    """Sweep local rows and columns: all of them, or those of a device."""
    student, batch = operands.student, operands.student.hidden.shape[:-1]
    layout = blocks.layout(
        Sizes(
            batch=batch,
            vocab=student.head.vocab_size(),
            widths=tuple(side.hidden.shape[-1] for side in operands.sides),
            weighted=weights is not None,
            platform=platform,
        )
    )
    if layout.engine == "pallas" and (platform == "gpu" or not statistic.in_tiles):
        name = type(statistic).__name__
        cause = "on a GPU" if platform == "gpu" else f"for {name}, which no kernel can absorb"
        raise ValueError(f"blocks.engine: expected 'scan' or 'rows' {cause}, got 'pallas'")
    halves: dict[str, Any] = {}
    if layout.engine == "pallas":
        # Pallas takes longer to import than this whole library.
        from logitjax.losses.sweep import _pallas

        halves = _pallas.kernels(platform, statistic)
    varying = _varying((operands, weights), axis_name)
    config = Sweep(
        statistic=statistic,
        block=layout.columns,
        token_block=layout.tokens,
        axis_name=axis_name,
        varying=varying,
        **halves,
        on_accelerator=platform != "cpu",
        together=_IDS_TOGETHER if platform == "tpu" else 0,
    )
    existing = weights if layout.engine == "rows" else None
    tokens = operands.tokens
    # Outside the custom rule, so that its transpose sums the gradients of replicated arrays.
    operands, existing = jax.tree.map(lambda x: ops.mesh.vary(x, varying), (operands, existing))
    if existing is None:
        outputs = engine.run_unreduced(config, operands)
    else:
        outputs = run_weighted(config, operands, existing)
    if axis_name is not None:
        outputs = jax.tree.map(lambda x: lax.psum(x, axis_name), outputs)
    if weights is None or existing is not None:
        return outputs
    return weighted_sum(_losses(statistic, len(batch), outputs, tokens), weights), outputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(statistic: Statistic, batch_ndim: int, outputs: Any, tokens: Any) -> Any:
    """Call `statistic.losses` such that cotangents of zero stay zero for any losses."""
    # Zero times the derivative of an undefined loss is nan; zero makes the sweep leave the position
    # out of its gradients.
    return statistic.losses(outputs, tokens)


def _losses_forward(statistic: Statistic, batch_ndim: int, outputs: Any, tokens: Any) -> Any:
    return jax.vjp(lambda outputs: statistic.losses(outputs, tokens), outputs)


def _losses_backward(statistic: Statistic, batch_ndim: int, pull: Any, cotangents: Any) -> Any:
    counts = engine.any_of(engine.drop_integers(cotangents), batch_ndim)

    def quiet(gradient: jax.Array) -> jax.Array:
        if gradient.dtype == jax.dtypes.float0:
            return gradient
        along = counts.reshape(counts.shape + (1,) * (gradient.ndim - batch_ndim))
        return jnp.where(along, gradient, jnp.zeros((), gradient.dtype))

    (gradients,) = pull(cotangents)
    return jax.tree.map(quiet, gradients), None


_losses.defvjp(_losses_forward, _losses_backward)


def _projection(name: str, hidden: Any, head: Any, temperature: Number) -> Projection:
    hidden = jnp.asarray(hidden)
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floating point, got {hidden.dtype}")
    if not hidden.ndim:
        raise ValueError(f"{name}: expected at least one axis, got a scalar")
    resolved = Head.of(head).resolve(hidden.shape[-1], name.replace("hidden", "head"))
    projection = Projection(hidden, jax.tree.map(jnp.asarray, resolved), None)
    scale = 1.0 / jnp.asarray(temperature, engine.sum_dtype(projection))
    return projection._replace(inverse_temperature=lax.stop_gradient(scale))


def _varying(tree: Any, axis_name: AxisName | None) -> tuple[str, ...]:
    """Mesh axes over which anything in the tree varies, vocabulary shards included."""
    axes = {a for x in jax.tree.leaves(tree) for a in ops.mesh.varying_axes(x)}
    if axis_name is not None and axes:
        axes |= {axis_name} if isinstance(axis_name, str) else set(axis_name)
    return tuple(sorted(axes))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _everywhere(
    local: tuple[Statistic, Blocks, str],
    mesh: Any,
    split: tuple[tuple[tuple[str, ...], ...], tuple[str, ...]],
    operands: Operands,
    weights: Array | None,
) -> Any:
    """Run `_local` under a `shard_map` over the axes of rows and columns."""
    rows, columns = split
    # Partition specs in place of arrays.
    spec: Any = PartitionSpec
    by_row, by_column, replicated = spec(*rows), spec(columns), spec()

    def layout(side: Projection) -> Projection:
        kernel = spec(*(columns if i == side.head.axis else None for i in range(2)))
        split_head = dataclasses.replace(side.head, kernel=kernel, bias=by_column)
        return Projection(by_row, split_head, replicated)

    def sweep_local(operands: Operands, weights: Array | None) -> Any:
        outputs = _local(*local, operands, weights, columns or None)
        over = tuple(name for names in rows for name in names)
        return outputs if weights is None else (lax.psum(outputs[0], over), outputs[1])

    student, *teachers = map(layout, operands.sides)
    teacher = teachers[0] if teachers else replicated
    specs = (Operands(student, teacher, by_column, by_row), by_row)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = {name for name, kind in kinds.items() if kind == AxisType.Explicit}
    named = {name for names in (*rows, columns) for name in names}
    if not named:
        # Under `vmap` the mapped axis may be named by the mesh, but not by `shard_map`.
        call: Any = functools.partial(_local, *local, axis_name=None)
        replicated = NamedSharding(mesh, PartitionSpec())
        run = jax.sharding.auto_axes(call, axes=tuple(explicit), out_sharding=replicated)
        return run(operands, weights)  # pyright: ignore[reportCallIssue]
    # Include all Auto axes if the others have one device: partial meshes compile less well.
    free = {name for name, kind in kinds.items() if kind == AxisType.Auto}
    alone = all(mesh.shape[name] == 1 or name in named for name in free)
    batch = operands.student.hidden.shape[:-1]
    arrays: Any = _padded(mesh, rows, columns, operands, weights)
    padded = arrays[0].student.hidden.shape[:-1]
    if explicit:
        arrays = _resharded(mesh, explicit, specs, arrays)
    outputs = jax.shard_map(
        sweep_local,
        mesh=mesh,
        in_specs=specs,
        out_specs=by_row if weights is None else (replicated, by_row),
        axis_names=explicit | (free if alone else named),
    )(*arrays)
    if padded == batch:
        return outputs
    total, outputs = (None, outputs) if weights is None else outputs
    outputs = jax.tree.map(lambda x: x[tuple(map(slice, batch))], outputs)
    return outputs if weights is None else (total, outputs)


def _mesh_of(*arrays: Any) -> Any:
    """Mesh of the context in which this is traced, or else that of the arrays."""
    meshes = (jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays))
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def _axes_of(x: Any) -> tuple[tuple[str, ...], ...]:
    """Mesh axes over which each axis of x is split, as far as x shows it."""
    notes = jax.typeof(x).sharding
    if not isinstance(x, Tracer) and isinstance(x.sharding, NamedSharding):
        notes = x.sharding
    return tuple(map(_names, (*notes.spec, *(None,) * x.ndim)[: x.ndim]))


def _names(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _split(mesh: Any, hidden: Any, head: Head) -> Any:
    """Mesh axes of each batch axis, and of the vocabulary; None if nothing is split."""
    # Explicit axes, and Auto axes of arrays outside `jit`, are read; others follow `MeshAxes`.
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = ops.sharding.MeshAxes.current()
    auto = {n for n, kind in kinds.items() if kind == AxisType.Auto and mesh.shape[n] > 1}
    explicit = {n for n, kind in kinds.items() if kind == AxisType.Explicit}
    free = auto | explicit
    rows = [tuple(n for n in axes if n in free) for axes in _axes_of(hidden)[:-1]]
    used = {n for axes in rows for n in axes}
    for location, expected in ((0, names.rows), (-1, names.sequence)):
        if rows:
            new = tuple(n for n in expected if n in auto - used)
            rows[location] += new
            used |= set(new)
    # An Explicit axis splits a replicated vocabulary only if the caller says so.
    by_name = auto if names == ops.sharding.MeshAxes() else free
    items = [n for n in _axes_of(head.kernel)[head.axis] if n in free]
    expected = [*items, *(n for n in names.columns if n in by_name)]
    columns = tuple(dict.fromkeys(n for n in expected if n not in used))
    unnamed = auto - used - {*columns, *names.rows, *names.columns, *names.sequence}
    if unnamed:
        size = head.kernel.size * head.kernel.dtype.itemsize / 2**20
        warnings.warn(
            f"mesh axes {', '.join(sorted(unnamed))}: expected names of losses.MeshAxes; what they "
            f"split is left to the compiler, which may gather the head, {size:,.0f} MiB, for every "
            "block of positions instead of once per sweep",
            stacklevel=2,
        )
    return (tuple(rows), columns) if used or columns or explicit else None


def _padded(
    mesh: Any, rows: Any, columns: tuple[str, ...], operands: Operands, weights: Array | None
) -> tuple[Operands, Array | None]:
    """Pad to sizes that the mesh divides, with rows of zeros and invalid entries."""

    def missing(size: int, axes: tuple[str, ...]) -> int:
        return -size % math.prod(mesh.shape[name] for name in axes)

    def pad(x: Any, *ends: int) -> Any:
        if not any(ends):
            return x
        return jnp.pad(x, [(0, end) for end in (*ends, *(0,) * (x.ndim - len(ends)))])

    batch, vocab = operands.student.hidden.shape[:-1], operands.student.head.vocab_size()
    of_rows = [missing(size, axes) for size, axes in zip(batch, rows, strict=True)]
    more = missing(vocab, columns)

    def side(side: Projection) -> Projection:
        ends = (more if i == side.head.axis else 0 for i in range(2))
        kernel, bias = pad(side.head.kernel, *ends), side.head.bias
        bias = None if bias is None else pad(bias, more)
        head = dataclasses.replace(side.head, kernel=kernel, bias=bias)
        return side._replace(hidden=pad(side.hidden, *of_rows), head=head)

    where = operands.vocab_where
    if more:
        where = pad(jnp.ones(vocab, bool) if where is None else where, more)
    student, *teachers = map(side, operands.sides)
    tokens, weights = jax.tree.map(lambda x: pad(x, *of_rows), (operands.tokens, weights))
    return Operands(student, teachers[0] if teachers else None, where, tokens), weights


def _resharded(mesh: Any, explicit: set[str], specs: Any, arrays: Any) -> Any:
    """Reshard as `shard_map` requires for Explicit axes; a head is gathered here, once."""

    def reshard(spec: Any, tree: Any) -> Any:
        entries = [tuple(n for n in _names(entry) if n in explicit) for entry in spec]

        def one(x: jax.Array) -> jax.Array:
            layout = NamedSharding(mesh, PartitionSpec(*entries[: x.ndim]))
            return jax.sharding.reshard(x, layout)

        return jax.tree.map(one, tree)

    return jax.tree.map(reshard, specs, arrays)
