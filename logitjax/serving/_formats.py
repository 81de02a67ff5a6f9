"""Answers that follow a structure: which tokens may come next.

Structures come from strangers, so each is first tried in a process that can be killed.
"""

import asyncio
import collections
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance
import numpy as np

from logitjax.models import Tokenizer
from logitjax.serving._errors import ApiError, BadRequestError

# Compact, but spaced as people and `json.dumps` write it: with white space at will small models
# write little else.
_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MOST_BYTES = 1 << 15
_SCRIPT = pathlib.Path(__file__).with_name("_structure_trial.py")
# Processor seconds: a schema of a thousand properties starts in a tenth of a second. Trials of all
# structures together take at most a tenth of all processors.
_TO_BEGIN, _TO_FOLLOW, _SHARE = 0.5, 5.0, 0.1
_REMEMBERED = 64
_MOST_WAITING = 64


class Formats:
    """Structures over the tokens of one model, compiled one at a time in a separate thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]):
        self._vocab_size = vocab_size
        self._pool = thread_pool("structure", 1)
        self._waiting = 0
        self._known: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        # The library requires an end token; without one, structures are unavailable.
        about: dict[str, Any] = {"n_vocab": vocab_size, "eos_token": list(end_ids) or [0]}
        text = tokenizer.backend.to_str()
        self._about = {"tokenizer": text} | about
        self._process: Any = None
        self._next, self._closed = 0.0, threading.Event()
        self._wrong = "" if end_ids else "this model has no token that ends an answer"
        try:
            self._tokens = llguidance.LLTokenizer(text, **about)
        except ValueError as error:
            self._wrong = f"this model's tokens cannot be held to one ({error})"

    def start(self) -> None:
        self._pool.submit(self._start)

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._end()

    async def follow(self, kind: str, text: str, field: str) -> "Follower":
        """Return the constraint of one answer; new ones wait in a queue of limited length."""
        if begun := self._remembered(kind, text):
            return _copied(begun, field)
        if self._waiting >= _MOST_WAITING:
            wait = {"Retry-After": "5"}
            raise ApiError(429, "too many structures are waiting", code="overloaded", headers=wait)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self.begin, kind, text, field)
        finally:
            self._waiting -= 1

    def begin(self, kind: str, text: str, field: str = "response_format") -> "Follower":
        """Compile in this thread: a copy of a remembered constraint, or a new one.

        Errors name the request's `field`.
        """
        begun = self._remembered(kind, text)
        if begun is None:
            try:
                begun = self._begin(kind, text)
            except ValueError as error:
                # Only its text: an error that is raised again keeps alive all frames it has passed.
                begun = " ".join(str(error).split())[:300]
        self._known[kind, text] = begun
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return _copied(begun, field)

    def _remembered(self, kind: str, text: str) -> Any:
        # Two threads may ask: the entry may be dropped at any time.
        with contextlib.suppress(KeyError):
            self._known.move_to_end((kind, text))
            return self._known[kind, text]

    def _begin(self, kind: str, text: str) -> "Follower":
        if self._wrong:
            raise ValueError(self._wrong)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"a structure of {len(text)} bytes, the limit is {_MOST_BYTES}")
        if kind == "json":
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_LAYOUT)
        else:
            grammar = llguidance.grammar_from(kind, text)  # pyright: ignore[reportArgumentType]
        if not self._passes(grammar):
            raise ValueError(f"it takes more than {_TO_BEGIN:g} s or too much memory to start")
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        follower = Follower(matcher, self._vocab_size)
        if follower.failed:
            raise ValueError(matcher.get_error().partition("<")[0])
        return follower

    def _start(self) -> None:
        if self._process is None:
            pipe = subprocess.PIPE
            command = [sys.executable, "-P", str(_SCRIPT)]
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe)
            self._say(self._about)

    def _passes(self, grammar: str) -> bool:
        """Whether a structure starts in time, tried in a process that can be killed."""
        self._closed.wait(self._next - time.monotonic())
        self._start()
        self._say({"grammar": grammar, "seconds": _TO_BEGIN})
        passed, _, seconds = self._process.stdout.readline().decode().partition(" ")
        # The process has ended, and restarts with the next structure.
        if not passed:
            self._end()
        rest = max(0.0, 1 / _SHARE / (os.cpu_count() or 1) - 1)
        self._next = time.monotonic() + rest * float(seconds or _TO_BEGIN)
        return passed == "passed"

    def _say(self, what: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


class Follower:
    """The progress of one answer through a grammar.

    `allowed` marks the tokens that may come next, uint32 `[words]`: bit `v % 32` of word `v // 32`
    for token v. If the grammar `failed`, by time or a limit of the library, it means nothing.
    `field` is the request's field that asked for it.
    """

    def __init__(self, matcher: Any, vocab_size: int, allowed: Any = None, field: str = ""):
        self._matcher, self._vocab_size, self.field = matcher, vocab_size, field
        self._seconds, self.failed = 0.0, False
        self.allowed = self._mask() if allowed is None else allowed

    def copy(self, field: str = "") -> "Follower":
        matcher, field = self._matcher.deep_copy(), field or self.field
        return Follower(matcher, self._vocab_size, self.allowed, field)

    def take(self, tokens: Sequence[int]) -> None:
        """Advance by chosen tokens. This is slow, so it runs off the engine's thread."""
        start = time.thread_time()
        # The plural form accepts no end token.
        for token in tokens:
            self._matcher.consume_token(token)
        self.allowed = self._mask()
        self._seconds += time.thread_time() - start
        self.failed = self.failed or self._seconds > _TO_FOLLOW

    def _mask(self) -> np.ndarray:
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self.failed = self._matcher.is_error()
        return words[: -(-self._vocab_size // 32)]


def _copied(begun: Any, field: str) -> Follower:
    if isinstance(begun, str):
        raise BadRequestError(f"{field}: {begun}", field)
    return begun.copy(field)


def thread_pool(name: str, threads: int) -> ThreadPoolExecutor:
    """Threads that yield the processors to others."""

    def step_aside() -> None:
        # Linux has a priority for each thread; elsewhere they have that of the process.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)

    return ThreadPoolExecutor(threads, name, initializer=step_aside)
