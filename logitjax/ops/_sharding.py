"""Where rows of a batch lie on a mesh.

JAX asks of gathers, sorts and scatters where their result lies when an axis is Explicit. They never
move data between rows of the batch, so the answer is always: as the input does.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

#: Mesh axes over which a batch is split, and a vocabulary: `logitjax.training.make_mesh`'s names.
BATCH_AXES = ("data", "fsdp")
VOCABULARY_AXES = ("tensor",)


def auto_axes(names: Sequence[str], size: int) -> tuple[str, ...]:
    """Those of the named axes that a dimension of this size can be split over here.

    They are axes of the mesh in whose context this is traced; there are none without such a context
    (`logitjax.training.make_train_step` makes one), where they do not divide the size, and where an
    axis is Explicit or, inside `shard_map`, Manual: then the split is somebody else's.

    >>> auto_axes(BATCH_AXES, 8)
    ()
    >>> device = jax.devices()[:1]
    >>> with jax.set_mesh(jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=device)):
    ...     auto_axes(BATCH_AXES, 8)
    ('data',)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return ()
    axes = tuple(name for name in names if name in mesh.axis_names)
    return () if size % math.prod(mesh.shape[name] for name in axes) else axes


def check_vocabulary_unsharded(values: jax.Array, name: str, operation: str) -> None:
    """Raises when the last axis of `values` is sharded over an Explicit mesh axis."""
    spec = jax.typeof(values).sharding.spec
    if len(spec) == values.ndim and values.ndim and spec[-1] is not None:
        raise ValueError(
            f"{name} is sharded over {spec[-1]!r} along its vocabulary: a {operation} needs "
            f"axis_name={spec[-1]!r} inside jax.shard_map, or an unsharded vocabulary"
        )


def over_batch(fn: Callable[..., Any], out_ndims: tuple[int, ...], *args: jax.Array) -> Any:
    """Calls `fn(*args)`, which maps rows (all axes but the last) of the first argument to rows.

    Args:
        fn: returns a tuple of arrays, as many as `out_ndims` has entries.
        out_ndims: per result, its number of axes; the leading ones are the batch axes of `args[0]`
            and are laid out like those.
        *args: arrays that share the leading axes of the first, or are the same for all of them.
    """
    sharding = jax.typeof(args[0]).sharding
    mesh = sharding.mesh
    explicit = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit
    )
    if not explicit:
        return fn(*args)
    batch = tuple(sharding.spec[:-1])

    def spec(ndim: int) -> NamedSharding:
        entries = (batch + (None,) * ndim)[:ndim]
        return NamedSharding(mesh, PartitionSpec(*entries))

    out_sharding = tuple(spec(ndim) for ndim in out_ndims)
    return jax.sharding.auto_axes(fn, axes=explicit, out_sharding=out_sharding)(*args)
