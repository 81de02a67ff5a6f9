"""Coordination of the processes of one run: who writes, and what is already done.

Process 0 writes and decides. With a single process these functions cost almost nothing, so the same
code runs everywhere.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from logitjax import storage
from logitjax.storage import may_pass, progress


def broadcast_from_first(make: Callable[[], Any]) -> Any:
    """Return on all processes what `make()` returns on process 0; only process 0 calls it.

    Processes that look at a shared disk at different moments may see different things. Therefore
    one looks and tells the others.

    Args:
        make: Returns anything that JSON can hold.

    >>> broadcast_from_first(lambda: {"step": 3})
    {'step': 3}
    """
    if jax.process_count() == 1:
        return make()
    first = jax.process_index() == 0
    text = json.dumps(make()).encode() if first else b""
    # All processes pass the same shape.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text, np.uint8) if first else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8).tobytes())


def run_on_first(name: str, work: Callable[[], Any]) -> None:
    """Process 0 does work that needs no other process; the others wait until it is done.

    Raises:
        Exception: The exception of `work` on process 0; on the others an error of the same kind.
    """
    with _outcome_of_first(name):
        if jax.process_index() == 0:
            work()


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Process 0 runs the body first. The others run it afterwards, and find its files on disk.

    Raises:
        Exception: The exception of the body on process 0; on the others an error of the same kind.
    """
    if jax.process_index() == 0:
        with _outcome_of_first(name):
            yield
    else:
        with _outcome_of_first(name):
            # Until process 0 is done.
            pass
        yield


@contextlib.contextmanager
def _outcome_of_first(name: str) -> Iterator[None]:
    """Tell all processes how the body ended on process 0; a failure there is raised everywhere."""
    first, failed = jax.process_index() == 0, None
    progress.mark(name)
    try:
        yield
    except Exception as error:
        if not first:
            raise
        failed = error
    if jax.process_count() > 1:
        notes, kind, message = broadcast_from_first(lambda: [name, _kind(failed), str(failed)])
        if notes != name:
            raise RuntimeError(f"process 0 is at {notes!r}, this one at {name!r}")
        if kind and not first:
            raise _KINDS[kind](f"process 0: {message}")
    if failed is not None:
        raise failed


# Exceptions that the other processes raise if process 0 failed.
_KINDS = {"passing": ConnectionError, "user": ValueError, "bug": RuntimeError}


def _kind(error: Exception | None) -> str:
    if error is None:
        return ""
    users = isinstance(error, ValueError | TypeError | OSError | ImportError)
    return "passing" if may_pass(error) else "user" if users else "bug"


def barrier(name: str) -> None:
    """Wait for all processes; `name` distinguishes this barrier from others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def local_copy(tree: Any) -> Any:
    """Return global arrays in full on this process's first device, for work it does alone.

    All processes must call it. Arrays that one process holds in full are returned unchanged.
    """
    if jax.process_count() == 1:
        return tree

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            # No communication.
            return leaf.addressable_data(0)
        return jax.device_put(
            multihost_utils.process_allgather(leaf, tiled=True), jax.local_devices()[0]
        )

    return jax.tree.map(whole, tree)


def kept(path: epath.Path, make: Callable[[], Any]) -> Any:
    """`storage.kept` of several processes: all make the record, and have the one on disk."""
    record = broadcast_from_first(lambda: storage.kept(path))
    if record is None:
        made = make()
        record = broadcast_from_first(lambda: storage.kept(path, lambda: made))
    return record
