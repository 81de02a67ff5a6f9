"""A step that never ends: one of many processes hangs, and all others wait for it."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging

_DEFAULT_SECONDS = 3600.0


def stall_seconds(given: float | None = None) -> float:
    """How long a step may take; 0 for ever.

    What is given, else ``LOGITJAX_STALL_SECONDS``, else an hour with several processes and for ever
    with one.
    """
    if given is not None:
        return given
    text = os.environ.get("LOGITJAX_STALL_SECONDS", "")
    if text:
        try:
            return float(text)
        except ValueError:
            raise ValueError(
                f"LOGITJAX_STALL_SECONDS: expected a number of seconds, got {text!r}"
            ) from None
    return _DEFAULT_SECONDS if jax.process_count() > 1 else 0.0


@contextlib.contextmanager
def watch_for_stalls(
    seconds: float, end: Callable[[int], None] = os._exit
) -> Iterator[Callable[[int], None]]:
    """Gives a function to call after every step; if it is not called for so long, the process ends.

    A thread does it, for the main one waits in a collective where nothing else reaches it. The
    clock starts with the first call, so that compiling is no stall. A process that is *gone* is
    noticed sooner, by JAX's heartbeat (:func:`distributed.initialize`).

    Args:
      seconds: 0 never ends anything.
      end: what ends the process, given its status, `os.EX_TEMPFAIL`: start the run again.

    >>> with watch_for_stalls(0.0) as alive:
    ...     alive(1)
    """
    if seconds <= 0:
        yield lambda step: None
        return
    last: list[tuple[int, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(min(1.0, seconds / 4)):
            if not last or time.monotonic() - last[0][1] < seconds:
                continue
            logging.error(
                "no step has ended for %.0f s after step %d: another process hangs or is lost. "
                "This one ends; the same command goes on from the newest checkpoint.",
                seconds,
                last[0][0],
            )
            sys.stderr.flush()
            end(os.EX_TEMPFAIL)
            return

    thread = threading.Thread(target=watch, name="stalls", daemon=True)
    thread.start()
    try:
        yield lambda step: last.__setitem__(slice(None), [(step, time.monotonic())])
    finally:
        done.set()
        thread.join()
