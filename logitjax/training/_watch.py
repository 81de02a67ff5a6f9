"""Detection of stalled runs and lost processes: the others end, and report why.

A separate thread does it, because the main one may wait in a collective, out of reach.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from logitjax.storage import progress

_DEFAULT_SECONDS = 3600.0
_PREFIX = "logitjax"
# JAX ends a process with a page of output if this one has reported nothing by then.
LATER_SECONDS = 30


def stall_seconds(processes: int) -> float:
    """`LOGITJAX_STALL_SECONDS`, else an hour with several processes and forever (0) with one."""
    text = os.environ.get("LOGITJAX_STALL_SECONDS", "")
    try:
        return float(text or _DEFAULT_SECONDS * (processes > 1))
    except ValueError:
        raise ValueError(
            f"LOGITJAX_STALL_SECONDS: expected a number of seconds, got {text!r}"
        ) from None


def end(cause: str, status: int = os.EX_TEMPFAIL, *, name: str = "") -> None:
    """End this process with one line, and tell the others of the run why."""
    logging.flush()
    sys.stdout.flush()
    announce(cause, status)
    if not name and _client() is not None:
        name = f"process {jax.process_index()}: "
    sys.stderr.write(f"error: {name}{cause}\n")
    sys.stderr.flush()
    _await_others()
    os._exit(status)


def announce(cause: str, status: int) -> None:
    """Leave a message for the other processes; the first message wins."""
    client = _client()
    if client is None:
        return
    try:
        client.key_value_set(f"{_PREFIX}/failed", f"{status} {jax.process_index()} {cause}")
    except Exception:  # Already reported, or the coordinator is gone.
        return


def _await_others() -> None:
    """The process that stores the messages exits last: JAX ends the others once it is gone."""
    client = _client()
    if client is None or jax.process_index() != 0:
        return
    until = time.monotonic() + 5.0
    try:
        while time.monotonic() < until:
            ended = client.key_value_dir_get(f"{_PREFIX}/ended/")
            if len(ended) >= jax.process_count() - 1:
                # They have read it and are exiting.
                time.sleep(0.3)
                return
            time.sleep(0.1)
    except Exception:
        return


def _client() -> Any:
    # `multihost_utils` waits on it; JAX has no public name for it.
    from jax._src import distributed

    return distributed.global_state.client


class Watch(threading.Thread):
    """Checks once a second whether the run moves and whether its processes are alive.

    After `stall` seconds without progress in any process, including packing and reading, or
    `heartbeat` seconds without a sign of life from one, `leave(cause, status)` ends this one.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        *,
        stall: float = 0.0,
        heartbeat: float = 100.0,
        leave: Callable[[str, int], Any] = end,
    ):
        super().__init__(name="watch", daemon=True)
        self._index, self._count = index, count
        self._stall, self._heartbeat, self._leave = stall, heartbeat, leave
        self._done = threading.Event()
        # For each process its last message, its progress in it, and the time.
        self._beats: dict[int, tuple[str, float]] = {}
        self._moved: dict[int, str] = {}
        self._last_move = time.monotonic()

    def stop(self) -> None:
        self._done.set()

    def run(self) -> None:
        pause = min(1.0, self._stall / 4 or 1.0, self._heartbeat / 4)
        beat = 0
        while not self._done.wait(max(pause, self._count / 100)):
            beat += 1
            cause = self._look(beat)
            if cause is not None and not self._done.is_set():
                self._leave(*cause)
                return

    def _look(self, beat: int) -> tuple[str, int] | None:
        now = time.monotonic()
        marks, doing = progress.last()
        self._note(self._index, f"{beat} {marks}", now)
        client = _client() if self._count > 1 else None
        if self._count > 1 and client is None:
            # This process has left the others after all finished.
            return None
        if client is not None:
            try:
                client.key_value_set(
                    f"{_PREFIX}/beats/{self._index}", f"{beat} {marks}", allow_overwrite=True
                )
                words = dict(client.key_value_dir_get(f"{_PREFIX}/"))
            except Exception:
                # Without process 0 there is no news of any process: see below.
                words = {}
            for key, message in words.items():
                if key.endswith("/failed"):
                    return self._told(client, message)
                if "/beats/" in key:
                    self._note(int(key.rpartition("/")[2]), message, now)
            for process, (_, when) in self._beats.items():
                if now - when > self._heartbeat:
                    return f"process {process} is gone while {doing}; {_AGAIN}", os.EX_TEMPFAIL
        if self._stall and now - self._last_move > self._stall:
            return (
                f"nothing has moved for {self._stall:.0f} s while {doing}: a process, a disk or a "
                f"store hangs; {_AGAIN}",
                os.EX_TEMPFAIL,
            )
        return None

    def _note(self, process: int, message: str, now: float) -> None:
        if self._beats.get(process, ("",))[0] != message:
            self._beats[process] = (message, now)
        marks = message.partition(" ")[2]
        if self._moved.get(process) != marks:
            self._moved[process] = marks
            self._last_move = now

    def _told(self, client: Any, message: str) -> tuple[str, int] | None:
        status, process, cause = message.split(" ", 2)
        if int(process) == self._index:
            return None
        with contextlib.suppress(Exception):
            client.key_value_set(f"{_PREFIX}/ended/{self._index}", "", allow_overwrite=True)
        return f"process {process} failed: {cause}", int(status)


_AGAIN = "the same command continues from the newest checkpoint"
