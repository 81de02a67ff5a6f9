"""Requests to stop: SIGTERM to one process, or to any of many."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
    """The run was asked to stop, and saved. Uncaught, it ends the process with status 143."""

    def __init__(self, step: int):
        super().__init__(128 + signal.SIGTERM)
        self.step = step

    def __str__(self) -> str:
        return f"stopped by SIGTERM after step {self.step}"


@contextlib.contextmanager
def watch_for_preemption() -> Iterator[Callable[[int], bool]]:
    """Return a function that tells, once per step, whether to save and stop now.

    A second SIGTERM ends a single process at once; one that no answer told of does at the end. With
    several processes, JAX's preemption service makes all answer yes at the same step after a
    SIGTERM to any, so all must ask at every step.

    >>> with watch_for_preemption() as told_to_stop:
    ...     told_to_stop(1)
    False
    """
    if jax.process_count() > 1:
        # JAX has its own handler for SIGTERM, which ours would replace.
        yield multihost_utils.reached_preemption_sync_point
        return
    event, told = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # No handler can be set here.
        yield lambda step: False
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)

    def told_to_stop(step: int) -> bool:
        if event.is_set():
            told.set()
        return told.is_set()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield told_to_stop
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
    if event.is_set() and not told.is_set():
        signal.raise_signal(signal.SIGTERM)
