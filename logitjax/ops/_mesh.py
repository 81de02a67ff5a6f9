"""Queries about the current mesh, and the paths of a pytree's leaves.

When a mesh axis is Explicit, JAX must be told how the result of a gather, sort or scatter is split.
These never move data between rows of a batch, so the answer is always: like the input.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax.ops._types import AxisName


def auto_axes(names: Sequence[str], size: int) -> tuple[str, ...]:
    """The named axes over which a dimension of this size can be split here.

    The axes are those of the mesh in whose context this is traced (`logitjax.training.TrainStep`
    provides such a context). The result is empty without a context, if the axes do not divide the
    size, and if an axis of the mesh is Explicit. Axes that are Manual, inside `shard_map`, are
    already split and omitted.

    >>> auto_axes(("data",), 8)
    ()
    >>> device = jax.devices()[:1]
    >>> with jax.set_mesh(jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=device)):
    ...     auto_axes(("data",), 8)
    ('data',)
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    if AxisType.Explicit in kinds.values():
        # There, types carry the sharding.
        return ()
    axes = tuple(name for name in names if kinds.get(name) == AxisType.Auto)
    return () if size % math.prod(mesh.shape[name] for name in axes) else axes


def free_axes() -> set[str]:
    """The Auto axes of the mesh, all of which `shard_map` must take around a chip's kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    explicit = AxisType.Explicit in kinds.values()
    return set() if explicit else {n for n, kind in kinds.items() if kind == AxisType.Auto}


def platform_of(*arrays: Any) -> str:
    """Return the platform of the program that is traced here: `cpu`, `tpu` or `gpu`.

    Programs may be compiled for absent devices, so the arrays' mesh takes precedence.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    for mesh in (*meshes, jax.sharding.get_abstract_mesh()):
        if (device := mesh.abstract_device) is not None:
            return device.platform
    return jax.default_backend()


def over_batch(fn: Callable[..., Any], out_ndims: tuple[int, ...], *args: jax.Array) -> Any:
    """Call `fn(*args)`, which maps rows (all axes but the last) of the first argument to rows.

    Args:
        fn: returns a tuple of arrays, as many as `out_ndims` has entries.
        out_ndims: number of axes of each result. The leading ones are the batch axes of `args[0]`,
            and are split in the same way.
        *args: arrays that share the leading axes of the first, or belong to all rows.
    """
    sharding = jax.typeof(args[0]).sharding
    mesh = sharding.mesh
    explicit = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit
    )
    if not explicit:
        return fn(*args)
    # Rows keep their sharding; their last axis is not split.
    batch = tuple(sharding.spec[:-1])

    def spec(ndim: int) -> NamedSharding:
        # Further axes are not split.
        return NamedSharding(mesh, P(*(batch + (None,) * ndim)[:ndim]))

    out_sharding = tuple(spec(ndim) for ndim in out_ndims)
    return jax.sharding.auto_axes(fn, axes=explicit, out_sharding=out_sharding)(*args)


def varying_axes(x: Any) -> frozenset[str]:
    """Mesh axes over which x varies, as `jax.shard_map` records it."""
    return jax.typeof(x).manual_axis_type.varying


def vary(x: Any, axes: Iterable[str]) -> Any:
    """Mark x as varying over axes, as carries and custom rules require in `shard_map`."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def path_string(path: Any) -> str:
    """The path of a leaf as text, `layers/0/kernel`, without the `value` of an nnx variable."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def path_mask(tree: Any, pattern: str) -> Any:
    """Mark the leaves whose path contains a match of the regular expression.

    >>> path_mask({"head": {"bias": 0, "kernel": 1}}, "bias$")
    {'head': {'bias': True, 'kernel': False}}
    """
    search = re.compile(pattern).search
    return jax.tree_util.tree_map_with_path(
        lambda path, _: search(path_string(path)) is not None, tree
    )


def psum(values: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Sum over the shards of a vocabulary; without an axis name there is one shard."""
    return values if axis_name is None else jax.lax.psum(values, axis_name)
