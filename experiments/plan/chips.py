"""Chips by name: their memory and speed, and devices to compile for."""

import dataclasses
import os
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        kind: `tpu`, `gpu` or `cpu`.
        memory: Bytes of memory; 0 if unknown.
        flops: Peak bfloat16 operations a second; 0 if unknown.
        hbm: Bytes a second read from its own memory; 0 if unknown.
        bandwidth: Bytes a second received from its slice or node; 0 if unknown.
        between: Bytes a second received from other slices; 0 if unknown.
        clock: Cycles a second of its matrix units; 0 if unknown.
        topology: The slice, as JAX names it, for TPUs.
        slices: Number of such slices.
        count: Number of devices, for GPUs and CPUs; 0: as many as the mesh has.
    """

    name: str
    kind: str
    memory: float
    flops: float
    hbm: float = 0.0
    bandwidth: float = 0.0
    between: float = 0.0
    clock: float = 0.0
    topology: str = ""
    slices: int = 1
    count: int = 0


# Memory as the compilers have it (TPUs, in GiB), and the makers' data sheets: dense bfloat16 peak,
# memory reads, all links of a chip in one direction, and its share of its host's network. A chip of
# TPU7x is two devices; its links' bandwidth and its compiler's values are not known here. The clock
# is the peak over two operations of each cell of 4 (v5e) or 8 (v5p) matrix units of 128 x 128.
_TPUS = {
    "v5e": (15.75, 197e12, 819e9, 200e9, 3.125e9, 1.5e9),
    "v5p": (95.74, 459e12, 2765e9, 600e9, 6.25e9, 1.75e9),
    "v6e": (31.25, 918e12, 1638e9, 400e9, 12.5e9, 0.0),
    "tpu7x": (0.0, 1153.5e12, 3690e9, 0.0, 0.0, 0.0),
}
# Available slices of each TPU, smallest first.
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
_GPUS = {"h100": (80e9, 989e12, 3350e9, 450e9, 50e9), "h200": (141e9, 989e12, 4800e9, 450e9, 50e9)}


def parse_chip(text: str, slices: int = 1) -> Chip:
    """Parse `v5p:4x4x8` (a slice), `h100` or `h100:64` (that many), `cpu:8` (of this machine).

    >>> parse_chip("v5p:2x2x2", slices=2).slices, parse_chip("h200:16").count
    (2, 16)
    """
    name, _, size = text.partition(":")
    if name in _TPUS and all(side.isdigit() for side in size.split("x")):
        gib, *rates = _TPUS[name]
        return Chip(name, "tpu", gib * 2.0**30, *rates, topology=text, slices=slices)
    if slices != 1:
        raise ValueError(f"slices: expected 1, for only TPUs have them, got {slices}")
    if (name in _GPUS or name == "cpu") and (size.isdigit() or not size):
        rates = _GPUS.get(name, (0.0, 0.0, 0.0, 0.0, 0.0))
        return Chip(name, "gpu" if name in _GPUS else "cpu", *rates, count=int(size or 0))
    existing = ", ".join([*(f"{tpu}:TOPOLOGY" for tpu in _TPUS), *_GPUS, "cpu:COUNT"])
    raise ValueError(f"chip: expected one of {existing}, got {text!r}")


def prepare(chip: Chip, mesh: str) -> None:
    """Settings that JAX reads before it makes a device; no accelerator is touched here."""
    jax.config.update("jax_platforms", "cpu")
    if chip.kind == "tpu":
        # Otherwise libtpu looks for a TPU and for the metadata of a cloud machine.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        # Kernels of this machine's CPU do not belong in the program.
        os.environ["LOGITJAX_NATIVE"] = "0"
        return
    count = chip.count
    if not count:
        count = 1
        for part in mesh.split(","):
            size = part.partition(":")[2].strip()
            if not size.isdigit():
                raise ValueError(
                    f"chip: {chip.name} needs a count such as {chip.name}:64, or a mesh without -1"
                )
            count *= int(size)
    jax.config.update("jax_num_cpu_devices", count)


def devices_of(chip: Chip) -> list[Any]:
    """Devices to compile for: those of the slices, or as many of the host's."""
    if chip.kind != "tpu":
        return jax.devices("cpu")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=chip.topology, num_slices=chip.slices
        )
    except Exception as error:
        line = str(error).splitlines()[0]
        raise ValueError(
            f"chip: {chip.topology} cannot be compiled for ({line}); the extra `plan` brings the "
            "TPU compiler, on Python 3.12 or newer"
        ) from None
    return list(topology.devices)
