"""A workdir belongs to one run at a time."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

_BEAT_SECONDS = 20.0
_STALE_SECONDS = 90.0


class WorkdirInUseError(OSError):
    """Another run holds the workdir."""


@contextlib.contextmanager
def lock_workdir(workdir: epath.PathLike) -> Iterator[None]:
    """Holds the workdir's lock; a second run on it is refused.

    On a file system the operating system holds the lock and drops it with the process, however that
    ends. On an object store the holder refreshes a file; one that is older than 90 seconds, or of a
    process of this host that is gone, is stale. A stale lock is reported and taken over. Process 0
    locks for all processes.

    Args:
      workdir: made if needed.

    Raises:
      WorkdirInUseError: on every process, if another run holds it.

    >>> import tempfile
    >>> with lock_workdir(tempfile.mkdtemp()):
    ...     pass
    """
    path = epath.Path(workdir) / "lock"
    with contextlib.ExitStack() as stack:
        held = ""
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _object_lock if "://" in str(workdir) else _file_lock
            try:
                stack.enter_context(lock(path))
            except WorkdirInUseError as error:
                held = str(error)
        if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.asarray(bool(held))):
            held = held or f"workdir {str(workdir)!r} is in use by another run"
        if held:
            raise WorkdirInUseError(held)
        yield


def _owner() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}


def _read(text: str) -> dict[str, Any]:
    try:
        owner = json.loads(text)
        return owner if isinstance(owner, dict) else {}
    except ValueError:
        return {}


def _refusal(path: epath.Path, owner: dict[str, Any]) -> WorkdirInUseError:
    return WorkdirInUseError(
        f"workdir {str(path.parent)!r} is in use by process {owner.get('pid')} on "
        f"{owner.get('host')}; stop it or choose another workdir"
    )


@contextlib.contextmanager
def _file_lock(path: epath.Path) -> Iterator[None]:
    with open(path, "a+") as file:
        file.seek(0)
        owner = _read(file.read())
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _refusal(path, owner) from None
        if owner:
            logging.warning("taking over the stale lock of process %s", owner.get("pid"))
        file.truncate(0)
        file.write(json.dumps(_owner()))
        file.flush()
        try:
            yield
        finally:
            # Emptied, not removed: a waiting process may have the same file open.
            file.truncate(0)


@contextlib.contextmanager
def _object_lock(path: epath.Path) -> Iterator[None]:
    if path.exists() and (owner := _read(path.read_text())):
        fresh = time.time() - owner.get("time", 0) < _STALE_SECONDS
        gone = owner.get("host") == socket.gethostname() and not _alive(owner.get("pid", -1))
        if fresh and not gone:
            raise _refusal(path, owner)
        logging.warning("taking over the stale lock of process %s", owner.get("pid"))
    path.write_text(json.dumps(_owner()))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_BEAT_SECONDS):
            path.write_text(json.dumps(_owner()))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
