"""Checkpoints of the whole training state, through orbax."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging as python_logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import future as ocp_future

from logitjax.ops import mesh as on_mesh
from logitjax.storage import may_pass
from logitjax.training import _watch, _workdir
from logitjax.training._state import abstract_array


class _WithoutChatter(python_logging.Filter):
    """Drops the dozens of lines that orbax logs for every save; keeps its warnings."""

    # A save that fails in one of several processes ends them all. Orbax logs the error, and holds
    # it back until the others reach a barrier, which they would not for minutes.

    def filter(self, record: python_logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        saving = record.pathname.endswith("async_checkpointer.py")
        if saving and isinstance(error, Exception) and jax.process_count() > 1:
            message = " ".join(str(error).split())
            # A supervisor interprets EX_TEMPFAIL, 75, as a request to try again.
            _watch.end(f"checkpoint: {message}", os.EX_TEMPFAIL if may_pass(error) else 1)
        return record.levelno > python_logging.INFO or "orbax" not in record.pathname


_WITHOUT_CHATTER = _WithoutChatter()


class _MetaHandler(ocp.JsonCheckpointHandler):
    """JSON with checksums, whose values are awaited in the background."""

    _FILE = "metadata"

    def __init__(self) -> None:
        super().__init__(self._FILE)

    async def async_save(
        self, directory: epath.Path, item: Any = None, args: Any = None
    ) -> list[ocp_future.Future]:
        commit = self._commit(directory, args)
        return [ocp_future.CommitFutureAwaitingContractedSignals(commit, name="meta")]

    async def _commit(self, directory: epath.Path, args: "_MetaSave") -> None:
        # Waits in the background.
        meta = {"extra": args.extra, "checksums": args.checksums.wait()}
        if jax.process_index() == 0:
            # Without this file the checkpoint gets no final name.
            if not _workdir.holds_still(directory):
                raise ConnectionError(f"another run has taken over the folder of {directory}")
            (directory / self._FILE).write_text(json.dumps(meta))


@ocp.args.register_with_handler(_MetaHandler, for_save=True)
@dataclasses.dataclass
class _MetaSave(ocp.args.CheckpointArgs):
    extra: dict[str, Any]
    checksums: "_Checksums"


@ocp.args.register_with_handler(_MetaHandler, for_restore=True)
@dataclasses.dataclass
class _MetaRestore(ocp.args.CheckpointArgs):
    pass


class Restored(NamedTuple):
    state: Any
    step: int
    extra: dict[str, Any]


class Checkpointer:
    """Saves and restores a state with its step and a JSON dictionary.

    Saving is asynchronous. It returns once the state is copied to the host (or, with one process on
    a CPU, held so that the next step does not get its buffers). The files appear under their final
    name only when complete. The next call raises the error of a failed save. Each checkpoint has a
    checksum of every leaf, which detects a changed bit as well as a missing or short file. All
    processes must call every method. Leaves restore into any tree with the same paths.

    Args:
        directory: directory of the checkpoints; ``gs://`` works.
        max_to_keep: number of checkpoints to keep, two so that one may be damaged; None for all.

    >>> import tempfile
    >>> state = {"w": jnp.arange(3.0)}
    >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
    ...     _ = checkpointer.save(5, state, extra={"seed": 1})
    ...     restored = checkpointer.restore_latest(state)
    >>> restored.step, restored.extra, restored.state["w"].tolist()
    (5, {'seed': 1}, [0.0, 1.0, 2.0])
    """

    def __init__(self, directory: epath.PathLike, *, max_to_keep: int | None = 2):
        self.directory = epath.Path(directory)
        if "://" not in str(directory):
            self.directory = self.directory.resolve()
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"checkpoint directory {str(directory)!r} is a file")
        # Adding the same filter object twice has no effect.
        logging.get_absl_logger().addFilter(_WITHOUT_CHATTER)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": _MetaHandler()},
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep, cleanup_tmp_directories=True
            ),
        )
        # One thread saves in order.
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._handover: concurrent.futures.Future | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception):
            self.close()
        elif jax.process_count() == 1:
            # Later calls fail for the same reason; the first error is the one to report.
            with contextlib.suppress(Exception):
                self.close()
        # With several processes, the others may never reach the barrier where this one would wait.

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> bool:
        """Save the state, unless this step exists already; return whether it was saved.

        Args:
            state: a pytree of global arrays. It may be donated as soon as this returns.
        """
        if step in self.steps():
            return False
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_nested(state)),
            meta=_MetaSave(extra=dict(extra or {}), checksums=_Checksums(state)),
        )
        stored = _hold(args.state.item) if _on_one_host(state) else None
        if stored is None:
            self._save(step, args)
        else:
            # Orbax inspects every leaf before it returns, which takes longer than the data.
            views, args.state.item = stored
            self._handover = self._worker.submit(self._save, step, args, views)
        return True

    def steps(self) -> list[int]:
        """The steps that can be restored, oldest first."""
        self._handed_over()
        return sorted(self._manager.all_steps())

    def restore(self, state: Any, step: int) -> Restored:
        """Restore one checkpoint onto the mesh of ``state``, whichever mesh it was saved from.

        Args:
            state: a pytree of arrays or ``ShapeDtypeStruct`` with shardings, as from
                `TrainState.abstract`. Arrays are not overwritten.

        Raises:
            ValueError: if the checkpoint is missing, unreadable, or of another state.
        """
        if step not in self.steps():
            raise ValueError(f"no checkpoint of step {step} in {self.directory}: {self.steps()}")
        try:
            return self._read(state, step)
        except _UnreadableError as error:
            raise ValueError(f"checkpoint {step} in {self.directory}: {error}") from None

    def restore_latest(self, state: Any) -> Restored | None:
        """Restore the newest checkpoint that can be read.

        An unreadable checkpoint is logged and renamed to ``corrupt_STEP``, and the previous one is
        used; None if none can be read.

        Args:
            state: as for :meth:`restore`.

        Raises:
            ValueError: if one is of another state.
        """
        self.wait()
        steps = self.steps()[::-1]
        for tried, step in enumerate(steps):
            try:
                restored = self._read(state, step)
            except _UnreadableError as error:
                older = steps[tried + 1 : tried + 2]
                logging.warning(
                    "checkpoint %d in %s is corrupt: %s; %s",
                    step,
                    self.directory,
                    error,
                    f"using checkpoint {older[0]}" if older else "no older one can be read",
                )
                continue
            self._set_aside(steps[:tried])
            return restored
        self._set_aside(steps)
        return None

    def wait(self) -> None:
        """Wait until the last save is on disk."""
        self._handed_over()
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and end the background threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._manager.close()

    def _save(self, step: int, args: Any, views: list[np.ndarray] | None = None) -> None:
        self._manager.save(step, args=args, force=True)
        # Held until then.
        if views is not None:
            self._manager.wait_until_finished()

    def _handed_over(self) -> None:
        handover, self._handover = self._handover, None
        if handover is not None:
            handover.result()

    def _read(self, state: Any, step: int) -> Restored:
        self._manager.wait_until_finished()
        requested = _nested(jax.tree.map(abstract_array, state))
        state_args = ocp.args.StandardRestore(requested)
        args = ocp.args.Composite(state=state_args, meta=_MetaRestore())
        # All check before any restores, because orbax synchronises them in there.
        mismatch = _reading(
            lambda: _mismatch(requested, self._manager.item_metadata(step)["state"].tree)
        )
        if mismatch is not None:
            raise ValueError(f"checkpoint {step} in {self.directory}: {mismatch}")
        result = _reading(lambda: self._manager.restore(step, args=args))
        leaves = [
            functools.reduce(dict.__getitem__, path.split("/"), result["state"])
            for path in _paths(state)
        ]
        restored = jax.tree.unflatten(jax.tree.structure(state), leaves)
        expected = result["meta"].get("checksums", {})
        for name, value in _Checksums(restored).wait().items():
            if expected.get(name) != value:
                raise _UnreadableError(f"the checksum of {name!r} differs")
        return Restored(restored, step, result["meta"].get("extra", {}))

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                aside = self.directory / f"corrupt_{step}"
                if aside.exists():
                    aside.rmtree()
                (self.directory / str(step)).rename(aside)
        _all_processes(True)
        self._manager.reload()


def _on_one_host(state: Any) -> bool:
    """Whether the state lies in the memory of this process, the only one."""
    return jax.process_count() == 1 and all(
        device.platform == "cpu" for leaf in jax.tree.leaves(state) for device in leaf.devices()
    )


def _hold(state: Any) -> tuple[list[np.ndarray], Any] | None:
    """Views that keep XLA from donating the state's buffers to a step, and the state."""
    # Keys have no such view; they are small.
    state = jax.tree.map(lambda leaf: jax.random.clone(leaf) if _is_key(leaf) else leaf, state)
    views = []
    for leaf in jax.tree.leaves(state):
        for shard in () if _is_key(leaf) else leaf.addressable_shards:
            views.append(np.asarray(shard.data))
            if views[-1].ctypes.data != shard.data.unsafe_buffer_pointer():
                # A copy, which holds nothing.
                return None
    return views, state


class _UnreadableError(Exception):
    pass


def _reading(work: Callable[[], Any]) -> Any:
    """Read on all processes, and fail on all if one fails."""
    # A failing disk or store says nothing about the checkpoint: its error is raised unchanged, and
    # with several processes it ends all, because the others wait for this one.
    message, result = None, None
    # Failing reads leave asyncio tasks behind, which log long complaints.
    asyncio_log = python_logging.getLogger("asyncio")
    level = asyncio_log.level
    asyncio_log.setLevel(python_logging.CRITICAL + 1)
    try:
        result = work()
    except Exception as error:
        if may_pass(error):
            if jax.process_count() > 1:
                _watch.end(f"checkpoint: {' '.join(str(error).split())[:300]}")
            raise
        message = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
    finally:
        asyncio_log.setLevel(level)
    if not _all_processes(message is None):
        raise _UnreadableError(message or "another process could not read it")
    return result


def _paths(tree: Any) -> list[str]:
    return [on_mesh.path_string(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _nested(tree: Any) -> dict[str, Any]:
    """The leaves in nested dicts by path: the stored form does not depend on any class."""
    nested: dict[str, Any] = {}
    for path, leaf in zip(_paths(tree), jax.tree.leaves(tree)):
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _mismatch(expected: Any, stored: Any) -> str | None:
    expected = dict(zip(_paths(expected), jax.tree.leaves(expected)))
    stored = dict(zip(_paths(stored), jax.tree.leaves(stored)))
    for name, leaf in expected.items():
        if name not in stored:
            return f"it lacks {name!r}"
        if _is_key(leaf):
            continue
        has, expects = (f"{np.dtype(x.dtype)}{list(x.shape)}" for x in (stored[name], leaf))
        if has != expects:
            return f"{name!r} is {has} in it, expected {expects}"
    for name in stored:
        if name not in expected:
            return f"it holds {name!r}, which this state lacks"
    return None


@jax.jit
def _sum_bits(leaves: list[jax.Array]) -> jax.Array:
    def total(leaf: jax.Array) -> jax.Array:
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        if leaf.dtype == jnp.bool_:
            bits = leaf
        else:
            width = leaf.dtype.itemsize
            unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)  # 8 bytes: two
            bits = jax.lax.bitcast_convert_type(leaf, unsigned)
        # Integer sums wrap and commute: the same on every mesh.
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jnp.stack([total(leaf) for leaf in leaves])


class _Checksums:
    """Checksum of each leaf, being computed: by then the leaves may have been donated."""

    def __init__(self, tree: Any):
        leaves = jax.tree.leaves(tree)
        sums = _sum_bits(leaves)
        if not sums.is_fully_addressable:
            mesh = next(x.sharding.mesh for x in leaves if isinstance(x.sharding, NamedSharding))
            sums = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(sums)
        self._names, self._sums = _paths(tree), sums

    def wait(self) -> dict[str, int]:
        return {name: int(value) for name, value in zip(self._names, np.asarray(self._sums))}


def _all_processes(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())
