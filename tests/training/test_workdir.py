"""One run a workdir: on a file system by its locks, on an object store by generations."""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
import types

import pytest
from etils import epath

from logitjax import storage
from logitjax.training import _watch, _workdir, lock_workdir
from logitjax.training._workdir import WorkdirInUseError


@contextlib.contextmanager
def another_process(workdir):
    """Holds the lock from a process that knows nothing of this one's."""
    script = """
import fcntl, json, os, sys
file = open(sys.argv[1], "a+b")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(json.dumps({"pid": os.getpid(), "host": "here"}).encode())
file.flush()
print(flush=True)
sys.stdin.read()
os.unlink(sys.argv[1])
"""
    command = [sys.executable, "-c", script, workdir / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def test_a_second_run_is_refused_and_told_whose_the_workdir_is(tmp_path):
    with another_process(tmp_path) as holder:
        message = rf"folder .* is in use by process {holder.pid} on"
        with pytest.raises(WorkdirInUseError, match=message), lock_workdir(tmp_path):
            pass
    with lock_workdir(tmp_path):
        pass
    assert not (tmp_path / "lock").exists()


def test_what_lies_in_a_held_workdir_is_held_too(tmp_path):
    with lock_workdir(tmp_path), lock_workdir(tmp_path / "arm"), lock_workdir(tmp_path):
        assert not (tmp_path / "arm").exists()
    with lock_workdir(f"{tmp_path}/arm"):
        assert (tmp_path / "arm" / "lock").exists()


def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(OSError, match=r"cannot be locked: No locks available: .*lock") as error,
        lock_workdir(tmp_path),
    ):
        pass
    assert error.value.errno == errno.ENOLCK


class Bucket:
    """Writes made on a condition, as `tensorstore.KvStore` has them, over a dictionary."""

    def __init__(self):
        self.value, self.generation, self.lock = None, 0, threading.Lock()

    def read(self, _):
        state = "missing" if self.value is None else "value"
        return done(state=state, value=self.value, stamp=self.stamp())

    def stamp(self):
        return types.SimpleNamespace(generation=str(self.generation).encode())

    def write(self, _, value, *, if_equal):
        with self.lock:
            if if_equal != self.stamp().generation:
                return done(generation=b"")
            self.value, self.generation = value, self.generation + 1
            return done(generation=self.stamp().generation)


def done(**values):
    """A future that has come."""
    return types.SimpleNamespace(result=lambda timeout=None: types.SimpleNamespace(**values))


@pytest.fixture
def bucket(monkeypatch):
    made = Bucket()
    monkeypatch.setattr(_workdir, "_store", lambda workdir: made)
    monkeypatch.setattr(_workdir, "_BEAT_SECONDS", 0.2)
    monkeypatch.setattr(_workdir, "_STALE_SECONDS", 1.2)
    monkeypatch.setattr(_workdir, "_LOOK_SECONDS", 0.02)
    monkeypatch.delenv("LOGITJAX_RUN", raising=False)
    return made


REMOTE = epath.Path("gs://bucket/run")


def test_an_object_lock_that_is_kept_up_refuses_and_one_that_is_not_is_taken_over(bucket):
    with (
        _workdir._object_lock(REMOTE),
        pytest.raises(WorkdirInUseError),
        _workdir._object_lock(REMOTE),
    ):
        pass
    assert bucket.value is None
    bucket.value = json.dumps({"pid": 1, "host": "gone", "run": "other"}).encode()
    with _workdir._object_lock(REMOTE):
        assert json.loads(bucket.value)["pid"] == os.getpid()


def test_a_lock_that_nobody_renews_is_looked_at_twice_a_second_and_taken_after_45(monkeypatch):
    now, looks, left = 0.0, 0, Bucket()
    left.value = json.dumps({"pid": 1, "host": "gone", "run": "other"}).encode()
    read = left.read

    def look(name):
        nonlocal looks
        looks += 1
        return read(name)

    def sleep(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(left, "read", look)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
    _workdir._acquire(left, "mine", REMOTE)
    assert (now, looks) == (45.0, 91)


def test_a_restart_of_the_same_run_takes_the_lock_at_once_and_the_old_holder_ends(
    bucket, monkeypatch
):
    ended = threading.Event()
    monkeypatch.setattr(_watch, "end", lambda cause, status=75: ended.set())
    monkeypatch.setenv("LOGITJAX_RUN", "job-7")
    monkeypatch.setattr(_workdir, "_STALE_SECONDS", 1000.0)
    with _workdir._object_lock(REMOTE):
        monkeypatch.setattr(_workdir, "_ME", "another pod")
        generation = _workdir._acquire(bucket, "job-7", REMOTE)
        monkeypatch.setattr(_workdir, "_ME", "this one")
        assert json.loads(bucket.value)["holder"] == "another pod"
        assert ended.wait(10)
    assert bucket.stamp().generation == generation


def test_of_runs_that_start_at_once_one_wins(bucket):
    for _ in range(5):
        won, refused = [], []
        begin, done = threading.Barrier(2), threading.Barrier(2)

        def start(begin=begin, done=done, won=won, refused=refused):
            begin.wait()
            try:
                with _workdir._object_lock(REMOTE):
                    won.append(1)
                    done.wait()
            except WorkdirInUseError:
                refused.append(1)
                done.wait()

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (won, refused) == ([1], [1])


def test_a_paused_holder_whose_lock_was_taken_may_not_commit(bucket, monkeypatch):
    monkeypatch.setattr(_workdir, "_held", [str(REMOTE)])
    checkpoints = REMOTE / "train" / "checkpoints"
    bucket.write("lock", _workdir._owner("a"), if_equal=bucket.stamp().generation)
    assert _workdir.holds_still(checkpoints)
    monkeypatch.setattr(_workdir, "_ME", "another pod")
    bucket.write("lock", _workdir._owner("b"), if_equal=bucket.stamp().generation)
    monkeypatch.setattr(_workdir, "_ME", "this one")
    assert not _workdir.holds_still(checkpoints)
    # Other folders are nobody's, and so are files: their lock goes with its process.
    assert _workdir.holds_still(epath.Path("gs://bucket/runs"))


def test_a_launcher_starts_a_run_again_while_it_makes_something_new(tmp_path, monkeypatch):
    def start():
        with lock_workdir(tmp_path):
            pass

    monkeypatch.setenv("LOGITJAX_MAX_STARTS", "3")
    for _ in range(5):
        start()  # by hand, as often as one likes
    assert not (tmp_path / "starts.json").exists()
    monkeypatch.setenv("LOGITJAX_RUN", "job-7")
    for step in (5, 10):
        for _ in range(3):
            start()
            # What tells of a run, or was cut off, is nothing new.
            (tmp_path / "metrics.jsonl").write_text(f"{step}")
            (tmp_path / "checkpoints" / f"{step}.orbax-checkpoint-tmp").mkdir(
                parents=True, exist_ok=True
            )
        made = tmp_path / "checkpoints" / str(step) / "state"
        made.parent.mkdir()
        made.write_text("")
    for number in range(3):
        start()
        (tmp_path / f"{number}.log").write_text("")
    with pytest.raises(ValueError, match=r"expected progress in 3 starts, got none"):
        start()
    # Another job begins its own count, and a damaged record is none.
    monkeypatch.setenv("LOGITJAX_RUN", "job-8")
    start()
    (tmp_path / "starts.json").write_text("{")
    start()


def test_a_read_only_folder_is_no_failure_that_passes(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match="is read-only") as error, lock_workdir(tmp_path):
        pass
    assert not storage.may_pass(error.value)
