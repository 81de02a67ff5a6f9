"""The device mesh and the placement of batches on it."""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from logitjax.ops.sharding import BATCH_AXES, VOCABULARY_AXES

AXES = (*BATCH_AXES, *VOCABULARY_AXES)


def make_mesh(spec: str = "data:-1,fsdp:1,tensor:1", devices: Any = None) -> Mesh:
    """Makes the mesh that a specification such as ``data:-1,fsdp:2`` describes.

    The axes are ``data`` (copies of the model), ``fsdp`` (the batch *and* the parameters are split)
    and ``tensor`` (heads, feed-forward and vocabulary are split). An axis that the specification
    leaves out has size 1, and at most one size may be -1: whatever is left of the devices. All axes
    are ``Auto``: the compiler propagates shardings.

    Args:
      spec: comma-separated ``axis:size``, outermost axis first.
      devices: the devices, by default all of them; those of an ahead-of-time topology will do.

    Returns:
      The mesh over exactly these devices.

    Raises:
      ValueError: on another axis or syntax, or sizes that do not multiply to the device count.

    >>> dict(make_mesh("fsdp:-1", devices=jax.devices()[:1]).shape)
    {'fsdp': 1, 'data': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(np.asarray(devices).flat)
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        name, _, size = part.strip().partition(":")
        if name not in AXES or name in sizes:
            raise ValueError(
                f"mesh {spec!r}: expected each of {', '.join(AXES)} at most once, got {part!r}"
            )
        try:
            sizes[name] = int(size)
        except ValueError:
            raise ValueError(
                f"mesh {spec!r}: expected 'axis:size' such as 'data:-1', got {part!r}"
            ) from None
        if sizes[name] == 0 or sizes[name] < -1:
            raise ValueError(f"mesh {spec!r}: a size is positive or -1, got {part!r}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {spec!r}: only one axis may be -1, got {' and '.join(free)}")
    fixed = int(np.prod([size for size in sizes.values() if size > 0], dtype=np.int64))
    if free:
        if len(devices) % fixed:
            raise ValueError(f"mesh {spec!r}: {fixed} does not divide the {len(devices)} devices")
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ValueError(f"mesh {spec!r}: it needs {fixed} devices, there are {len(devices)}")
    for name in AXES:
        sizes.setdefault(name, 1)
    types = (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)
    except NotImplementedError:
        # On a TPU torus of 4 x 4 x 8 no product of sides is 2: an axis then takes a part of a side.
        grid = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
        return Mesh(grid, tuple(sizes), axis_types=types)


def make_partial_mesh(spec: str) -> Mesh:
    """As `make_mesh`, but a specification that fixes all its sizes takes only so many devices.

    Raises:
      ValueError: as `make_mesh`; or a process would have none of the devices.

    >>> make_partial_mesh("data:1").size
    1
    """
    sizes = [int(part.partition(":")[2]) for part in spec.split(",")]
    devices = jax.devices() if -1 in sizes else jax.devices()[: math.prod(sizes)]
    without = set(range(jax.process_count())) - {device.process_index for device in devices}
    if without:
        raise ValueError(
            f"mesh {spec!r}: expected devices of all {jax.process_count()} processes, got none of "
            f"process {min(without)}; data:-1 takes all"
        )
    return make_mesh(spec, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first dimension over ``data`` and ``fsdp``."""
    axes = tuple(name for name in mesh.axis_names if name in BATCH_AXES)
    return NamedSharding(mesh, PartitionSpec(axes))


def process_slice(mesh: Mesh) -> tuple[int, int]:
    """Which share of a global batch this process feeds: ``(index, count)``.

    Usually the process's own index and count. Processes that the ``tensor`` axis joins hold the
    same rows and so get the same index.

    >>> process_slice(make_mesh("data:1", devices=jax.devices()[:1]))
    (0, 1)
    """
    shards = batch_sharding(mesh).devices_indices_map((batch_shards(mesh),))
    rows: dict[int, set[int]] = {}
    for device, (index,) in shards.items():
        rows.setdefault(device.process_index, set()).add(index.indices(batch_shards(mesh))[0])
    shares = sorted({tuple(sorted(share)) for share in rows.values()})
    flat = [row for share in shares for row in share]
    if len(flat) != len(set(flat)) or len({len(share) for share in shares}) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: processes share batch rows unevenly; make data x fsdp a "
            f"multiple of the process count, or a divisor of it"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """Which rows of a global batch this process feeds to :func:`make_global_batch`.

    Raises:
      ValueError: the processes cannot share so many rows.

    >>> local_rows(make_mesh("data:1", devices=jax.devices()[:1]), 4)
    slice(0, 4, None)
    """
    index, count = process_slice(mesh)
    if batch_size % count:
        raise ValueError(f"batch_size: {count} processes cannot share {batch_size} rows")
    share = batch_size // count
    return slice(index * share, (index + 1) * share)


def batch_shards(mesh: Mesh) -> int:
    """Into how many pieces the mesh cuts a batch."""
    return int(np.prod([mesh.shape[name] for name in mesh.axis_names if name in BATCH_AXES]))


def make_global_batch(mesh: Mesh, batch: Any) -> Any:
    """Makes one global array, sharded over ``data`` and ``fsdp``, of every process's rows.

    Args:
      mesh: the mesh.
      batch: a pytree of numpy arrays ``[local_batch, ...]``: this process's rows, the
        :func:`process_slice` share of the global batch.

    Returns:
      The same pytree of ``jax.Array`` ``[global_batch, ...]``.

    Raises:
      ValueError: if a leaf has no batch dimension, or the mesh does not divide it.

    >>> mesh = make_mesh("data:1", devices=jax.devices()[:1])
    >>> make_global_batch(mesh, {"tokens": np.zeros((4, 7), np.int32)})["tokens"].shape
    (4, 7)
    """
    sharding = batch_sharding(mesh)
    pieces, count = batch_shards(mesh), process_slice(mesh)[1]

    def place(path: Any, leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        leaf = np.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] * count % pieces:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"batch {name!r}: its first dimension times {count} processes must be a "
                f"multiple of data x fsdp = {pieces}, got shape {leaf.shape}"
            )
        shape = (leaf.shape[0] * count, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree_util.tree_map_with_path(place, batch)
