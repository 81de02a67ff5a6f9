"""Continuous batching: one thread owns the engine, fills its slots and hands out what they emit."""

import asyncio
import collections
import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from logitjax.decoding import Emitted, Engine, Request
from logitjax.serving._errors import ApiError, BadRequestError, OverloadedError
from logitjax.serving._policy import Disclosure


@dataclasses.dataclass(frozen=True)
class Token:
    """One emitted token, on the host."""

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]]
    last: bool
    stopped: bool


class Job:
    """A request on its way: its tokens arrive in `tokens`, None ends them early."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop):
        self.request = request
        self.tokens: asyncio.Queue[Token | ApiError] = asyncio.Queue()
        self.cancelled = False
        self._loop = loop

    def give(self, items: Sequence[Token | ApiError]) -> None:
        """Called by the engine's thread."""

        def put() -> None:
            for item in items:
                self.tokens.put_nowait(item)

        try:
            self._loop.call_soon_threadsafe(put)
        except RuntimeError:  # The server is closing; nobody waits any more.
            self.cancelled = True


class Scheduler:
    """Requests in, tokens out; many at a time over the slots of one engine.

    Args:
        model: Whatever `Engine` takes.
        disclosure: What is reported of it.
        slots: Number of requests decoded together.
        max_length: Most tokens of a request, prompt included.
        end_ids: Tokens that end an answer.
        max_waiting: Number of requests that may wait for a slot before others are refused.
        chunk: Decoding steps between looks at the queue.
    """

    def __init__(
        self,
        model: Any,
        disclosure: Disclosure,
        *,
        slots: int,
        max_length: int,
        end_ids: Sequence[int],
        max_waiting: int = 64,
        chunk: int = 4,
    ):
        self.engine = Engine(
            model,
            slots=slots,
            max_length=max_length,
            options=disclosure.options(end_ids),
            extra=disclosure.extra(()),
        )
        self._disclosure = disclosure
        self.max_waiting = max_waiting
        self.failed: Exception | None = None
        self._chunk = chunk
        self._jobs: list[Job | None] = [None] * slots
        self._waiting: collections.deque[Job] = collections.deque()
        self._wake = threading.Condition()
        self._closing = False
        self._seconds = 1.0  # A running mean of how long a slot is taken.
        self._started = [0.0] * slots
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; jobs under way get an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    @property
    def load(self) -> tuple[int, int]:
        """Slots taken, and requests waiting."""
        return sum(job is not None for job in self._jobs), len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all jobs of one HTTP request, or none.

        Raises:
            OverloadedError: They would not fit into the queue.
            ApiError: The engine has died.
        """
        with self._wake:
            if self.failed is not None:
                raise ApiError(503, "the engine stopped")
            free = self._jobs.count(None)
            if len(self._waiting) + len(jobs) > self.max_waiting + free:
                turns = 1 + len(self._waiting) / max(1, len(self._jobs))
                raise OverloadedError(max(1, round(turns * self._seconds)))
            self._waiting.extend(jobs)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception as error:
            # Nothing else may kill the server: those who wait are told, health turns bad.
            logging.exception("the engine stopped")
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._wake:
            self.failed = error
            waiting = [*self._waiting, *[job for job in self._jobs if job is not None]]
            self._waiting.clear()
            self._jobs = [None] * len(self._jobs)
        for job in waiting:
            job.give([ApiError(503, "the engine stopped")])

    def _step(self) -> bool:
        with self._wake:
            while not self._closing and not self._waiting and not any(self._jobs):
                self._wake.wait()
            closing = self._closing
        if closing:
            self._fail(ApiError(503, "the server is closing"))
            return False
        self._drop_cancelled()
        self._fill()
        if any(self._jobs):
            self._hand_out(self.engine.decode_chunk(self._chunk), range(len(self._jobs)))
        return True

    def _drop_cancelled(self) -> None:
        gone = [i for i, job in enumerate(self._jobs) if job is not None and job.cancelled]
        for slot in gone:
            self._jobs[slot] = None
        if gone:
            self.engine.evict(gone)

    def _fill(self) -> None:
        for slot, held in enumerate(self._jobs):
            if held is not None:
                continue
            job = self._next()
            if job is None:
                return
            try:
                emitted = self.engine.prefill(slot, job.request)
            except (ValueError, TypeError) as error:  # A request that slipped through the checks.
                job.give([BadRequestError(str(error))])
                continue
            self._jobs[slot] = job
            self._started[slot] = time.monotonic()
            self._hand_out(emitted, [slot])

    def _next(self) -> Job | None:
        with self._wake:
            while self._waiting:
                job = self._waiting.popleft()
                if not job.cancelled:
                    return job
        return None

    def _hand_out(self, emitted: Emitted, slots: Sequence[int]) -> None:
        tokens = np.asarray(emitted.tokens)
        valid = np.asarray(emitted.valid)
        if tokens.ndim == 1:
            tokens, valid = tokens[:, None], valid[:, None]
        shape = tokens.shape
        logprobs = top_ids = top = None
        if emitted.logprobs is not None:
            logprobs = self._disclosure.report(np.asarray(emitted.logprobs).reshape(shape))
        if emitted.top_ids is not None:
            top_ids = np.asarray(emitted.top_ids).reshape(*shape, -1)
            top = self._disclosure.report(np.asarray(emitted.top_logprobs).reshape(*shape, -1))
        active = self.engine.active
        stopped = np.asarray(self.engine.state.stopped)
        for row, slot in enumerate(slots):
            job = self._jobs[slot]
            if job is None:
                continue
            places = np.flatnonzero(valid[row])
            found = []
            for place in places:
                last = bool(place == places[-1] and not active[slot])
                token, best, own = int(tokens[row, place]), (), None
                if top is not None and top_ids is not None:
                    ids, values = top_ids[row, place].tolist(), top[row, place].tolist()
                    best = tuple(zip(ids, values, strict=True))
                if logprobs is not None and self._disclosure.tells(token, [i for i, _ in best]):
                    own = float(logprobs[row, place])
                found.append(
                    Token(
                        id=token,
                        logprob=own,
                        top=best,
                        last=last,
                        stopped=last and bool(stopped[slot]),
                    )
                )
            job.give(found)
            if not active[slot]:
                self._jobs[slot] = None
                spent = time.monotonic() - self._started[slot]
                self._seconds += 0.1 * (spent - self._seconds)
