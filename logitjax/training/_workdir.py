"""Locks, so that a workdir belongs to one run at a time."""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from logitjax import processes
from logitjax.storage import digest, write_atomic
from logitjax.training import _watch

# Seconds between renewals of a lock; an owner that misses them for longer is gone.
_BEAT_SECONDS = 10.0
_STALE_SECONDS = 45.0
_LOOK_SECONDS = 0.5
_FEW_RETRIES = {
    "gcs_request_retries": {"max_retries": 4, "initial_delay": "500ms", "max_delay": "4s"}
}
# Workdirs locked by this process.
_held: list[str] = []


class WorkdirInUseError(ValueError):
    """Another run has locked the workdir."""


@contextlib.contextmanager
def lock_workdir(workdir: epath.PathLike) -> Iterator[None]:
    """Hold the lock of a workdir, so that a second run on it is refused.

    On a file system the operating system holds the lock, and releases it when the process ends. On
    an object store the lock is an object that is only written over the generation that was read, so
    only one of two simultaneous starts succeeds. The owner renews it every ten seconds. Another run
    takes it over if it has not been renewed for 45 seconds. No clocks are compared. A restart by
    the script that started the run (with the same `LOGITJAX_RUN`, which `launch/` sets) takes it
    over at once. An owner that finds it taken, or cannot renew it for as long, ends with status 75.

    Folders within a locked workdir are locked too. Process 0 locks for all. `starts.json` counts a
    launcher's starts since the run last made a new file, such as a checkpoint or part of a cache.
    `LOGITJAX_MAX_STARTS` (20) without a new file are an error.

    Raises:
        WorkdirInUseError: On every process, if another run holds the lock.
        ValueError: A launcher has started the run that often without any new file.

    >>> import tempfile
    >>> with lock_workdir(tempfile.mkdtemp()):
    ...     pass
    """
    location = os.fspath(workdir).rstrip("/")
    remote = "://" in location
    location = location if remote else os.path.abspath(location)
    if any(location == stored or location.startswith(stored + "/") for stored in _held):
        yield
        return
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            holds = _object_lock if remote else _file_lock
            stack.enter_context(holds(epath.Path(location)))
            _count_start(epath.Path(location))

        processes.run_on_first(f"lock {location}", lock)
        _held.append(location)
        try:
            yield
        finally:
            _held.remove(location)


def holds_still(workdir: epath.Path) -> bool:
    """Whether this process still holds the lock of a folder on an object store.

    A process that was paused for a minute may have lost it, and must not overwrite the other run's
    files. A file lock ends only with its process, so there this is always true.
    """
    location = os.fspath(workdir)
    outer = [stored for stored in _held if "://" in stored and location.startswith(f"{stored}/")]
    return all(_is_ours(_store(epath.Path(stored)).read("lock").result()) for stored in outer)


# Files that record a run's starts and are not part of its results.
_RECORDS = re.compile(
    r"(\.|lock$|starts\.json|config\.json|error|metrics\.jsonl|.*\.log$|corrupt_)"
)


def _count_start(workdir: epath.Path) -> None:
    run = os.environ.get("LOGITJAX_RUN")
    if not run:
        return
    path, most = workdir / "starts.json", int(os.environ.get("LOGITJAX_MAX_STARTS", "20"))
    contents = digest(sorted(_made_files(workdir)))
    before = _read(path.read_bytes()) if path.exists() else {}
    same = before.get("run") == run and before.get("made") == contents
    count = int(before.get("starts", 0)) + 1 if same else 1
    if count > most:
        raise ValueError(
            f"folder {str(workdir)!r}: expected progress in {most} starts, got none; its "
            f"error.txt may give the reason (remove {path.name} to continue)"
        )
    write_atomic(path, json.dumps({"run": run, "made": contents, "starts": count}))


def _made_files(folder: epath.Path, above: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        name = f"{above}{path.name}"
        # An interrupted save does not count.
        if _RECORDS.match(path.name) or "orbax-checkpoint-tmp" in path.name:
            continue
        if path.is_dir():
            yield from _made_files(path, f"{name}/")
        else:
            yield name


# In pods, every process is process 1 of a host with the same name.
_ME = uuid.uuid4().hex


def _owner(run: str) -> bytes:
    host = socket.gethostname()
    return json.dumps({"pid": os.getpid(), "host": host, "run": run, "holder": _ME}).encode()


def _read(text: bytes | str) -> dict[str, Any]:
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _refusal(workdir: epath.Path, owner: dict[str, Any]) -> WorkdirInUseError:
    return WorkdirInUseError(
        f"folder {str(workdir)!r} is in use by process {owner.get('pid')} on "
        f"{owner.get('host')}; stop it or choose another folder"
    )


@contextlib.contextmanager
def _file_lock(workdir: epath.Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    path = os.fspath(workdir / "lock")
    while True:
        try:
            file = open(path, "a+b")  # noqa: SIM115
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            # A disk that becomes read-only may recover; a disk that is read-only from the start is
            # the wrong folder.
            raise PermissionError(errno.EACCES, "is read-only", os.fspath(workdir)) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise _refusal(workdir, _read(file.read())) from None
        except OSError as error:
            file.close()
            # Some network file systems have no locks; that does not mean another run.
            raise OSError(error.errno, f"cannot be locked: {error.strerror}", path) from None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                break
        # The last owner has removed this file since it was opened.
        file.close()
    with file:
        file.truncate(0)
        file.write(_owner(""))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _store(workdir: epath.Path) -> Any:
    """The key-value store under a prefix, with conditional writes."""
    import tensorstore

    scheme, _, rest = os.fspath(workdir).partition("://")
    bucket, _, prefix = rest.partition("/")
    driver = {"gs": "gcs"}.get(scheme, scheme)
    prefix = f"{prefix}/" if prefix else ""
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": prefix}
    if driver == "gcs":
        spec["context"] = _FEW_RETRIES
    return tensorstore.KvStore.open(spec).result()


@contextlib.contextmanager
def _object_lock(workdir: epath.Path) -> Iterator[None]:
    store = _store(workdir)
    # Counts as a separate run if no launcher identifies it.
    run = os.environ.get("LOGITJAX_RUN") or uuid.uuid4().hex
    generation = _acquire(store, run, workdir)
    stop = threading.Event()

    def beat() -> None:
        nonlocal generation
        last = time.monotonic()
        while not stop.wait(_BEAT_SECONDS):
            before, begun = generation, time.monotonic()
            try:
                generation = _write(store, run, before)
            except Exception as error:
                logging.warning("folder %s: its lock cannot be written: %s", workdir, error)
                generation = before
                # From now on other runs may take it over.
                if time.monotonic() - last > _STALE_SECONDS - 2 * _BEAT_SECONDS:
                    _watch.end(f"the lock of folder {workdir} cannot be written ({error})")
                continue
            if generation is None:
                # A lost response leaves a generation of our own.
                result = store.read("lock").result()
                if _is_ours(result):
                    generation = result.stamp.generation
                else:
                    _watch.end(f"another run has taken folder {workdir} over")
                    return
            last = begun

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_BEAT_SECONDS)
        with contextlib.suppress(Exception):
            store.write("lock", None, if_equal=generation).result(timeout=_BEAT_SECONDS)


def _is_ours(lock: Any) -> bool:
    return lock.state == "value" and _read(lock.value).get("holder") == _ME


def _write(store: Any, run: str, generation: bytes) -> bytes | None:
    """Write over this generation; return the new one, or None if another was written."""
    written = store.write("lock", _owner(run), if_equal=generation).result(timeout=_BEAT_SECONDS)
    # A value that was not written has no generation.
    return written.generation or None


def _acquire(store: Any, run: str, workdir: epath.Path) -> bytes:
    watched, since = None, time.monotonic()
    while True:
        result = store.read("lock").result()
        generation = result.stamp.generation
        if result.state != "value":
            written = _write(store, run, generation)
        else:
            owner = _read(result.value)
            if watched is None:
                watched, since = generation, time.monotonic()
            elif watched != generation:
                raise _refusal(workdir, owner)
            stale = time.monotonic() - since >= _STALE_SECONDS
            written = None
            if owner.get("run") == run or stale:
                logging.warning("taking over the lock of process %s", owner.get("pid"))
                written = _write(store, run, generation)
        if written is not None:
            return written
        time.sleep(_LOOK_SECONDS)
