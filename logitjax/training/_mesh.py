"""The device mesh and the placement of batches on it."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from logitjax.ops.sharding import MeshAxes

AXES = (*MeshAxes().rows, *MeshAxes().sequence, "tensor", "expert")


def make_mesh(
    spec: str = "data:-1,fsdp:1,tensor:1", devices: Any = None, *, partial: bool = False
) -> Mesh:
    """Make the mesh described by a specification such as ``data:-1,fsdp:2``.

    The axes are ``data`` (copies of the model), ``fsdp`` (the batch *and* the parameters are split)
    and ``tensor`` (heads, feed-forward and vocabulary are split). An omitted axis has size 1, and
    at most one size may be -1: all remaining devices. All axes are ``Auto``: the compiler
    propagates shardings.

    ``context`` splits the positions of each row, for rows too long for a device. Devices with later
    positions attend to more keys, and the others wait for them. ``expert`` splits the experts of a
    mixture, and the rows of a batch as ``data`` does.

    ``dcn_data`` is for TPU slices, or nodes, with a slow network between them. Each holds a copy of
    the model, so only gradients cross. It is the outermost axis, its size the number of slices
    (``dcn_data:-1`` counts them, or processes); the other axes share the devices of one slice.

    Args:
        spec: comma-separated ``axis:size``, outermost axis first.
        devices: the devices, by default all; those of an ahead-of-time topology also work.
        partial: a specification without a -1 uses only as many devices as it names, the first ones.

    Raises:
        ValueError: for another axis or syntax, sizes that do not multiply to the device count, or a
            ``dcn_data`` other than the number of slices; with `partial`, if a process gets none.

    >>> dict(make_mesh("fsdp:-1", devices=jax.devices()[:1]).shape)
    {'fsdp': 1, 'data': 1, 'tensor': 1}
    """
    everything = devices = jax.devices() if devices is None else list(np.asarray(devices).flat)
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
    slices = _slices(spec, sizes.pop("dcn_data", None), devices)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {spec!r}: only one axis may be -1, got {' and '.join(free)}")
    fixed = math.prod(size for size in sizes.values() if size > 0) * (slices or 1)
    if partial and not free:
        devices = devices[:fixed]
        without = {d.process_index for d in everything} - {d.process_index for d in devices}
        if without:
            raise ValueError(
                f"mesh {spec!r}: expected devices of all processes, got none of process "
                f"{min(without)}; data:-1 takes all"
            )
    if free:
        if len(devices) % fixed:
            raise ValueError(f"mesh {spec!r}: {fixed} does not divide the {len(devices)} devices")
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ValueError(f"mesh {spec!r}: it needs {fixed} devices, but there are {len(devices)}")
    for name in AXES:
        # Only if requested.
        if name not in ("dcn_data", "context", "expert"):
            sizes.setdefault(name, 1)
    if slices is not None:
        return _hybrid_mesh(slices, sizes, devices)
    # The compiler splits activations.
    shape, names, types = tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    except NotImplementedError:
        # On a TPU torus of 4 x 4 x 8 no product of sides is 2: an axis then takes part of a side.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, names, axis_types=types)


def _slices(spec: str, slices: int | None, devices: Any) -> int | None:
    """The size of ``dcn_data``, or None without such an axis."""
    # GPUs also have a slice_index, with another meaning.
    tpu = devices[0].platform == "tpu"
    key = "slice_index" if tpu else "process_index"
    count = len({getattr(device, key, 0) for device in devices})
    if slices is None and tpu and count > 1:
        raise ValueError(
            f"mesh {spec!r}: expected dcn_data:{count} too, for {count} slices, got none"
        )
    if slices is not None and slices != -1 and tpu and slices != count:
        raise ValueError(f"mesh {spec!r}: expected dcn_data:{count}, one per slice, got {slices}")
    return count if slices == -1 else slices


def _hybrid_mesh(slices: int, sizes: dict[str, int], devices: Any) -> Mesh:
    shape, names = tuple(sizes.values()), ("dcn_data", *sizes)
    if devices[0].platform != "tpu" or slices == 1:
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        # A process's devices are adjacent.
        grid = np.asarray(ordered).reshape(slices, *shape)
    else:
        # Only copies of the model communicate between slices.
        outer = (slices, *(1 for _ in shape))
        try:
            grid = mesh_utils.create_hybrid_device_mesh((1, *shape), outer, devices)
        except NotImplementedError:
            grid = mesh_utils.create_hybrid_device_mesh(
                (1, *shape), outer, devices, allow_split_physical_axes=True
            )
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """The layout of a batch on a mesh, and the rows of it that this process feeds.

    Attributes:
        mesh: Its ``dcn_data``, ``data``, ``fsdp`` and ``expert`` split a batch's first dimension.

    >>> layout = BatchLayout(make_mesh("data:1", devices=jax.devices()[:1]))
    >>> layout.share, layout.rows(4)
    ((0, 1), slice(0, 4, None))
    >>> layout.place({"tokens": np.zeros((4, 7), np.int32)})["tokens"].shape
    (4, 7)
    """

    mesh: Mesh

    @property
    def sharding(self) -> NamedSharding:
        """The sharding of a batch."""
        return NamedSharding(self.mesh, PartitionSpec(self._axes))

    @property
    def pieces(self) -> int:
        """Number of pieces into which the mesh splits a batch."""
        return math.prod(self.mesh.shape[name] for name in self._axes)

    @property
    def _axes(self) -> tuple[str, ...]:
        return tuple(name for name in self.mesh.axis_names if name in MeshAxes.current().rows)

    @property
    def share(self) -> tuple[int, int]:
        """The share of a global batch that this process feeds: ``(index, count)``.

        It is usually the process's own index and count. Processes joined by the ``tensor`` axis
        hold the same rows, so they get the same index.

        Raises:
            ValueError: Processes would share rows unevenly.
        """
        # Derived from the sharding: a mesh may order processes in any way.
        shards = self.sharding.devices_indices_map((self.pieces,))
        rows: dict[int, set[int]] = {}
        for device, (index,) in shards.items():
            rows.setdefault(device.process_index, set()).add(index.indices(self.pieces)[0])
        # Processes with the same rows, as joined by `tensor`, have one share.
        shares = sorted({tuple(sorted(share)) for share in rows.values()})
        flat = [row for share in shares for row in share]
        if len(flat) != len(set(flat)) or len({len(share) for share in shares}) > 1:
            raise ValueError(
                f"mesh {dict(self.mesh.shape)}: processes share batch rows unevenly; make data x "
                f"fsdp a multiple of the process count, or a divisor of it"
            )
        return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)

    def rows(self, batch_size: int) -> slice:
        """The rows of a global batch that this process feeds.

        Raises:
            ValueError: The processes cannot share this many rows.
        """
        index, count = self.share
        if batch_size % count:
            raise ValueError(f"batch_size: {count} processes cannot share {batch_size} rows")
        share = batch_size // count
        return slice(index * share, (index + 1) * share)

    def place(self, batch: Any) -> Any:
        """Make one global array from every process's rows.

        Numpy arrays ``[local_batch, ...]``, this process's `share`, become ``[global_batch, ...]``.

        Raises:
            ValueError: A leaf has no batch dimension, or the mesh does not divide it.
        """
        sharding, pieces, count = self.sharding, self.pieces, self.share[1]

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
