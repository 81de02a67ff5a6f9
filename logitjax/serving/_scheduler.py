"""Continuous batching: one thread owns the engine, fills its slots and delivers their tokens."""

import asyncio
import atexit
import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import logging

from logitjax.decoding import DraftControl, Engine, PromptReader, Request
from logitjax.serving._config import ServerConfig
from logitjax.serving._errors import ApiError, BadRequestError
from logitjax.serving._formats import Follower, thread_pool
from logitjax.serving._policy import Disclosure

# Decoding steps between two looks at the queue.
_STEPS = 4
# Seconds that a shutdown waits for the engine's thread.
_PATIENCE = 2.0
# Seconds that a step waits for the masks of structures; most take a tenth of that. Slots with later
# masks are left out of the step, and are given up after the second time. The wait is longer if
# nothing else can advance, but short enough for a new prompt not to notice.
_MASK_SECONDS, _IDLE_SECONDS, _MASK_PATIENCE = 0.005, 0.05, 10.0


@dataclasses.dataclass(frozen=True)
class Token:
    """One token on the host, emitted or part of a prompt."""

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]]
    last: bool = False
    stopped: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """Data that the copies of one prompt share."""

    # Only prompts with the same salt share what was read of them.
    salt: str = ""
    # Whether log-probabilities of the prompt's own tokens are requested.
    report: bool = False


class Job:
    """An answer in progress. Its tokens arrive in `tokens`; a finish reason ends them early."""

    def __init__(self, request: Request, prompt: Prompt, loop: asyncio.AbstractEventLoop):
        self.request, self.prompt = request, prompt
        # The structure, which determines the tokens that may come next.
        self.follower: Follower | None = None
        self.tokens: asyncio.Queue[Token | str | ApiError] = asyncio.Queue()
        # The prompt's tokens from the second on, if requested, once anything has arrived.
        self.prompt_report: Sequence[Token] = ()
        # Number of the prompt's tokens that were read before.
        self.cancelled, self.cached = False, 0
        # The pending mask of the tokens that may come next, and since when it is pending.
        self.mask: futures.Future[None] | None = None
        self.asked = 0.0
        self._loop = loop

    def give(self, items: Sequence[Token | str | ApiError]) -> None:
        """Deliver items; called by the engine's thread."""

        def put() -> None:
            for item in items:
                self.tokens.put_nowait(item)

        try:
            self._loop.call_soon_threadsafe(put)
        except RuntimeError:  # The server is closing, and no client waits any more.
            self.cancelled = True


class Scheduler:
    """Requests in, tokens out over an engine's slots; prompts are read in pieces between steps."""

    def __init__(
        self,
        model: Any,
        disclosure: Disclosure,
        end_ids: Sequence[int],
        config: ServerConfig,
        drafts: DraftControl | None = None,
    ):
        self.engine = Engine(
            model,
            slots=config.slots,
            max_length=config.max_length,
            options=disclosure.options(end_ids),
            extra=disclosure.extra(()),
            rings=not config.prefix_cache_mb,
            drafts=drafts,
        )
        # A piece must fit the cache, and its rows must divide it.
        rows = min(config.prefill_rows, config.max_length)
        piece = max(rows, min(config.prefill_chunk, config.max_length) // rows * rows)
        cache = config.prefix_cache_mb << 20
        self.reader = PromptReader(self.engine, rows=rows, chunk=piece, prefix_bytes=cache)
        self.failed: Exception | None = None
        self.ready = threading.Event()
        # Other owners of programs, which are compiled before the server is ready.
        self.compiles: list[Callable[[], None]] = []
        # Seconds of a chunk, and time since prompts were read.
        self.steps, self._since = _STEPS, 0
        self._max_waiting = config.max_waiting
        self._disclosure = disclosure
        self._jobs: list[Job | None] = [None] * config.slots
        self._waiting: collections.deque[list[Job]] = collections.deque()
        self._reading: dict[int, list[Job]] = {}
        self._read: list[int] = []
        self._wake = threading.Condition()
        self._closing = False
        self._end: threading.Timer | None = None
        self._expired = False
        # A running mean of the time that a slot is taken.
        self._seconds = 1.0
        self._started = [0.0] * config.slots
        # One bit per token: what a row may emit.
        words = -(-self.engine.plan.vocab_size // 32)
        self._allowed = np.full((config.slots, words), 0xFFFFFFFF, np.uint32)
        self._held = False
        self._masks = thread_pool("mask", 2)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which first compiles the programs it will need."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, or abandon it in a long program; jobs in progress get an error."""
        if self._end is not None:
            self._end.cancel()
        with self._wake:
            self._closing = True
            self._end_all(ApiError(503, "the server is stopping"))
            self._wake.notify()
        if self._thread.is_alive():
            # A compilation cannot be interrupted and may take minutes.
            self._thread.join(timeout=_PATIENCE)
        if self._thread.is_alive():
            # If XLA returned while Python exits, it would abort the process.
            atexit.register(self._thread.join)
        self._masks.shutdown(wait=False, cancel_futures=True)

    def drain(self, seconds: float) -> None:
        """Let requests in progress continue for this long, then end them as if too long."""
        self._end = threading.Timer(seconds, self._expire)
        self._end.daemon = True
        self._end.start()

    def _expire(self) -> None:
        with self._wake:
            self._expired = True
            self._end_all("length")

    @property
    def draining(self) -> bool:
        return self._end is not None

    @property
    def load(self) -> tuple[int, int]:
        return len(self._jobs) - self._jobs.count(None), self._queued()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs of one HTTP request, or none."""
        with self._wake:
            if self.failed is not None:
                raise ApiError(503, "the engine stopped")
            if self._expired:
                for job in jobs:
                    job.give(["length"])
                return
            free, queued = self._jobs.count(None), self._queued()
            if queued + len(jobs) > self._max_waiting + free:
                # Earlier jobs take turns in all slots; this estimates when a client may retry.
                turns = 1 + queued / max(1, len(self._jobs))
                after = {"Retry-After": str(max(1, round(turns * self._seconds)))}
                wait = "too many requests are waiting"
                raise ApiError(429, wait, code="overloaded", headers=after)
            groups: dict[int, list[Job]] = {}
            for job in jobs:
                groups.setdefault(id(job.prompt), []).append(job)
            self._waiting.extend(groups.values())
            self._wake.notify()

    def _queued(self) -> int:
        return sum(not job.cancelled for job in self._behind())

    def _behind(self) -> Iterator[Job]:
        return itertools.chain(*self._waiting, *self._reading.values())

    def _everybody(self) -> Iterator[Job]:
        return itertools.chain(self._behind(), filter(None, self._jobs))

    def _run(self) -> None:
        try:
            self._compile()
            while self._step():
                pass
        except Exception as error:
            # Nothing else may kill the server: waiting clients get an error, and health checks
            # fail.
            logging.exception("the engine stopped")
            with self._wake:
                self.failed = error
                self._end_all(ApiError(503, "the engine stopped"))

    def _compile(self) -> None:
        """Compile every program once, on a dummy request."""
        self.reader.compile(report=True)
        nobody = Request(prompt=[0], max_new_tokens=1)
        # The start of a report is not one of the reader's programs.
        for report in (True, False):
            row = self.reader.begin(nobody, report=report)
            self.reader.advance()
            self.reader.place(row, 0, nobody)
            self.reader.release(row)
        self.engine.allow(self._allowed)
        for steps in {1, self.steps}:
            self.engine.decode_chunk(steps)
        self.engine.compile_drafts(self.steps)
        self.engine.evict(0)
        self.reader.tokens_read = 0
        for compile_more in self.compiles:
            compile_more()
        self.ready.set()

    def _end_all(self, item: ApiError | str) -> None:
        """Tell all jobs; the engine's thread frees their slots as those of clients that left."""
        for job in self._everybody():
            if not job.cancelled:
                job.cancelled = True
                job.give([item])

    def _step(self) -> bool:
        with self._wake:
            while not (self._closing or any(self._everybody())):
                self._wake.wait()
            if self._closing:
                return False
        self._drop_cancelled()
        # If masks force single steps, prompts are not read between each two of them; otherwise
        # answers without a structure would wait four times as often.
        plain = any(job and job.follower is None for job in self._jobs)
        if not (plain and 0 < self._since < self.steps):
            self._since = 0
            self._begin()
            self._read += self.reader.advance()
        self._place()
        waits = self._waits()
        if any(job and not late for job, late in zip(self._jobs, waits, strict=True)):
            # The allowed tokens are known one token ahead.
            steps = 1 if self._hold(waits) else self.steps
            # Drafts would go past the next token that a structure allows.
            plain = steps == 1 or waits.any()
            engine = self.engine
            emitted = engine.decode_chunk(steps, waits) if plain else engine.advance(steps)
            self._hand_out(emitted, range(len(self._jobs)))
            self._since += steps
        return True

    def _drop_cancelled(self) -> None:
        cancelled = [i for i, job in enumerate(self._jobs) if job is not None and job.cancelled]
        for slot in cancelled:
            self._jobs[slot] = None
        if cancelled:
            self.engine.evict(cancelled)
        with self._wake:
            for row, group in list(self._reading.items()):
                group[:] = [job for job in group if not job.cancelled]
                if not group:
                    self._release(row)

    def _release(self, row: int) -> None:
        self.reader.release(row)
        del self._reading[row]
        self._read = [other for other in self._read if other != row]

    def _begin(self) -> None:
        """Move prompts into rows of the reader, in order of arrival."""
        while self.reader.free:
            with self._wake:
                while self._waiting and all(job.cancelled for job in self._waiting[0]):
                    self._waiting.popleft()
                if not self._waiting:
                    return
                first = self._waiting[0][0]
                # A beginning shared with a prompt being read is not read twice.
                if self.reader.waits(first.request.prompt, salt=first.prompt.salt):
                    return
            before, about = self.reader.tokens_reused, dataclasses.asdict(first.prompt)
            try:
                row = self.reader.begin(first.request, **about)
            except (ValueError, TypeError) as error:  # Slipped through the checks.
                with self._wake:
                    group = self._waiting.popleft()
                for job in group:
                    job.give([BadRequestError(str(error))])
                continue
            for job in self._waiting[0]:
                job.cached = self.reader.tokens_reused - before
            # A job is always in one of the two, so that ending all jobs finds it.
            with self._wake:
                self._reading[row] = self._waiting.popleft()

    def _place(self) -> None:
        """Move prompts that were read into free slots, in order of arrival."""
        placed: list[tuple[int, Any]] = []
        for row in list(self._read):
            if not self._empty(row, placed):
                break
            with self._wake:
                self._release(row)
        # Fetched together, so that the device is waited for once.
        for slot, emitted in placed:
            self._hand_out(emitted, [slot])

    def _empty(self, row: int, placed: list[tuple[int, Any]]) -> bool:
        """Put the jobs of one prompt into slots; return whether there were enough."""
        group = self._reading[row]
        report: list[Token] = []
        if group[0].prompt.report:
            report = [one for part in self.reader.report(row) for one in self._tokens(part)[0]]
        while group:
            job = group[0]
            job.prompt_report = report
            if not job.request.max_new_tokens:
                job.give(["length"])
            elif None in self._jobs:
                slot = self._jobs.index(None)
                emitted = self._fill(slot, row, job)
                placed += [] if emitted is None else [(slot, emitted)]
            else:
                return False
            group.pop(0)
        return True

    def _waits(self) -> np.ndarray:
        """The slots that have no mask yet; those that failed are emptied."""
        masks = {i: job.mask for i, job in enumerate(self._jobs) if job and job.mask}
        idle = len(masks) == len(self._jobs) - self._jobs.count(None) and not self._reading
        # If nothing else can advance, wait for the first mask.
        when = futures.FIRST_COMPLETED if idle else futures.ALL_COMPLETED
        futures.wait(masks.values(), _IDLE_SECONDS if idle else _MASK_SECONDS, when)
        waits = np.zeros(len(self._jobs), bool)
        for slot, mask in masks.items():
            job: Any = self._jobs[slot]
            waits[slot] = not mask.done()
            late = waits[slot] and time.monotonic() - job.asked > _MASK_PATIENCE
            if late or (mask.done() and (mask.exception() or job.follower.failed)):
                name = job.follower.field
                job.give([BadRequestError(f"{name}: too complex", name)])
                self._jobs[slot] = None
                self.engine.evict(slot)
            elif mask.done():
                job.mask = None
        return waits

    def _hold(self, waits: np.ndarray) -> bool:
        """Tell the engine the allowed tokens; return whether any advancing slot has a structure."""
        entries = {i: job.follower for i, job in enumerate(self._jobs) if job and job.follower}
        if entries or self._held:
            for slot, job in enumerate(self._jobs):
                # The mask of a waiting slot is still being written.
                mask = job and not waits[slot] and (job.follower or job.request).allowed
                self._allowed[slot] = mask if isinstance(mask, np.ndarray) else 0xFFFFFFFF
            self.engine.allow(self._allowed)
        self._held = bool(entries)
        return any(not waits[slot] for slot in entries)

    def _fill(self, slot: int, row: int, job: Job) -> Any | None:
        request = job.request
        if job.follower is not None:
            request = dataclasses.replace(request, allowed=job.follower.allowed)
        try:
            emitted = self.reader.place(row, slot, request)
        except (ValueError, TypeError) as error:  # Slipped through the checks.
            job.give([BadRequestError(str(error))])
            return None
        self._jobs[slot] = job
        self._started[slot] = time.monotonic()
        return emitted

    def _tokens(self, emitted: Any) -> list[list[Token]]:
        """Select the parts of emitted tokens that a policy reports, row by row."""
        tokens, valid = np.asarray(emitted.tokens), np.asarray(emitted.valid)
        if tokens.ndim == 1:
            tokens, valid = tokens[:, None], valid[:, None]
        shape = tokens.shape
        local = top_ids = top = None
        if emitted.logprobs is not None:
            local = self._disclosure.report(np.asarray(emitted.logprobs).reshape(shape))
        if emitted.top_ids is not None:
            top_ids = np.asarray(emitted.top_ids).reshape(*shape, -1)
            top = self._disclosure.report(np.asarray(emitted.top_logprobs).reshape(*shape, -1))
        rows = []
        for row in range(len(tokens)):
            items = []
            for location in np.flatnonzero(valid[row]):
                token, best, value = int(tokens[row, location]), (), None
                if top is not None and top_ids is not None:
                    ids, values = top_ids[row, location].tolist(), top[row, location].tolist()
                    best = tuple(zip(ids, values, strict=True))
                if local is not None and self._disclosure.tells(token, [i for i, _ in best]):
                    value = float(local[row, location])
                items.append(Token(token, value, best))
            rows.append(items)
        return rows

    def _hand_out(self, emitted: Any, slots: Sequence[int]) -> None:
        active, state = self.engine.active, self.engine.state
        stopped, left = np.asarray(state.stopped).tolist(), np.asarray(state.left).tolist()
        for structure, slot in zip(self._tokens(emitted), slots, strict=True):
            job = self._jobs[slot]
            if job is None:
                continue
            ended = not active[slot]
            if job.follower is not None:
                structure = _of_a_structure(structure)
                if structure and not ended:
                    tokens = [token.id for token in structure]
                    job.mask = self._masks.submit(job.follower.take, tokens)
                    job.asked = time.monotonic()
            # Logits that are nan, or -inf everywhere, end a row before its time.
            fails = ended and not (structure and (stopped[slot] or left[slot] == 0))
            if ended and not fails:
                structure[-1] = dataclasses.replace(structure[-1], last=True, stopped=stopped[slot])
            job.give([*structure, *[ApiError(500, "the model gave no probabilities")] * fails])
            if ended:
                self._jobs[slot] = None
                spent = time.monotonic() - self._started[slot]
                self._seconds += 0.1 * (spent - self._seconds)


def _of_a_structure(tokens: Sequence[Token]) -> list[Token]:
    """Withhold values that only a structure made likely: like a bias, it could read any value."""
    hidden = [token.id not in [id for id, _ in token.top] for token in tokens]
    untold = [dataclasses.replace(token, logprob=None) for token in tokens]
    return [b if hide else a for a, b, hide in zip(tokens, untold, hidden, strict=True)]
