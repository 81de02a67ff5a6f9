"""Start-up of one of several processes."""

import atexit
import functools
import importlib.util
import os
import pathlib
import re
import sys
from typing import Any

import jax
from absl import logging

from logitjax.storage import may_pass
from logitjax.training import _watch

# End this process with one line, at once; the others of its run end with the same status.
leave = _watch.end

_watching: list[_watch.Watch] = []


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    cluster: str = "auto",
    heartbeat_seconds: int | None = None,
) -> tuple[int, int]:
    """Join the other processes of a run, if any. Call it before anything uses a device.

    Missing values come from ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID`` (or ``JOB_COMPLETION_INDEX``, which Kubernetes sets in an indexed job). If
    none of these is set, JAX detects the cluster: SLURM, Open MPI, Kubernetes, TPU pods. Without a
    cluster, or with only one process, nothing happens.

    A process with several CPU devices, even a single process, gets three threads for each
    (``PJRT_NPROC``, unless it is set). By default XLA has as many threads as cores, and runs and
    starts the devices' programs on the same ones: if some wait to start a program, and others, in
    the previous program, wait for devices without a thread, they wait forever.

    Args:
        coordinator_address: ``host:port`` of process 0.
        cluster: ``auto``; ``none`` to stay alone; or the kind to expect: ``tpu``, ``slurm``,
            ``k8s``, ``ompi``.
        heartbeat_seconds: time until a silent process is lost and the others, whose collectives
            would wait forever, end with status 75; ``LOGITJAX_HEARTBEAT_SECONDS``, or 100.

    From then on a thread watches: if no process has packed, read, saved or taken a step for
    ``LOGITJAX_STALL_SECONDS`` (an hour with several processes, forever with one), or if one has
    gone or reported why it ends (`leave`), this one ends too.

    Returns:
        ``(process_index, process_count)``.

    Raises:
        ValueError: if some but not all three are known, ``cluster`` is unknown, or a variable is
            not a number.

    >>> initialize(cluster="none")
    (0, 1)
    """
    if cluster not in ("auto", "none", "tpu", "slurm", "k8s", "ompi"):
        raise ValueError(f"cluster: expected auto, none, tpu, slurm, k8s or ompi, got {cluster!r}")
    _enough_threads()
    if cluster == "none" or jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    env = os.environ
    if coordinator_address is None:
        coordinator_address = env.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _integer("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _integer("JAX_PROCESS_ID") if process_id is None else process_id
    result = cluster if cluster != "auto" else _detect()
    if process_id is None and coordinator_address and result != "slurm":
        process_id = _integer("JOB_COMPLETION_INDEX")
    if heartbeat_seconds is None:
        heartbeat_seconds = _integer("LOGITJAX_HEARTBEAT_SECONDS") or 100  # JAX's default
    entries = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in entries.items() if value is None]
    timeout = heartbeat_seconds + _watch.LATER_SECONDS
    join: Any = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=timeout)
    if num_processes == 1:
        # If it joined, it would send data between its own devices over sockets.
        logging.info("the only process")
    elif not missing:
        logging.info("process %s of %s, coordinator %s", *reversed(list(entries.values())))
        # Nothing is left to detect.
        join(*entries.values(), cluster_detection_method="deactivate")
    elif result is not None:
        logging.info("joining the %s cluster", result)
        join(**entries, local_device_ids=_slurm_devices() if result == "slurm" else None)
    elif len(missing) < 3:
        raise ValueError(
            f"{missing[0]}: expected with {' and '.join(n for n in entries if n not in missing)} "
            f"(flag or environment), got nothing"
        )
    location = jax.process_index(), jax.process_count()
    stall = _watch.stall_seconds(location[1])
    if not _watching and (location[1] > 1 or stall):
        watch = _watch.Watch(*location, stall=stall, heartbeat=heartbeat_seconds)
        watch.start()
        _watching.append(watch)
        atexit.register(_depart, watch)
        if location[1] > 1:
            _announce_what_is_not_caught()
    return location


def _depart(watch: _watch.Watch) -> None:
    """Wait for the others while the watch runs, then stop the watch.

    A thread that returns from a call of JAX's client while the interpreter exits aborts the
    process, so a finished run would end with status 134.
    """
    try:
        jax.distributed.shutdown()
    finally:
        watch.stop()
        watch.join(_watch.LATER_SECONDS)


def _announce_what_is_not_caught() -> None:
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        _watch.announce(f"{kind.__name__}: {error}", os.EX_TEMPFAIL if may_pass(error) else 1)
        before(kind, error, trace)

    sys.excepthook = hook


def _enough_threads() -> None:
    """Threads for each CPU device: one to run its program, one to start the next, one to spare."""
    flags = os.environ.get("XLA_FLAGS", "")
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", flags)
    devices = max(getattr(jax.config, "jax_num_cpu_devices", 1), int(forced[1]) if forced else 1)
    if devices > 1 and 3 * devices > _cores():
        os.environ.setdefault("PJRT_NPROC", str(3 * devices))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: expected an integer, got {text!r}") from None


def _detect() -> str | None:
    env = os.environ
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "ompi"
    platforms = env.get("JAX_PLATFORMS", "")
    tpu = any(pathlib.Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    if tpu and (not platforms or "tpu" in platforms) and importlib.util.find_spec("libtpu"):
        return "tpu"
    return "k8s" if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env else None


def _slurm_devices() -> list[int] | None:
    """All GPUs of the node if it runs one task; JAX would give that task only the first one."""
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
    return list(range(int(gpus))) if tasks == "1" and gpus.isdigit() and int(gpus) > 1 else None
