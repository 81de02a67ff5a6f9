"""The end of the engine's thread: nobody waits for it, whatever it does."""

import asyncio
import contextlib
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from logitjax.commands import serve
from logitjax.commands.line_up import LineUp
from logitjax.decoding import DraftControl, Ensemble, Request, generate
from logitjax.leakage import LogitPolicy
from logitjax.models import DraftHead
from logitjax.serving import ServerConfig
from logitjax.serving._policy import Disclosure
from logitjax.serving._scheduler import Job, Prompt, Scheduler, Token
from tests._marks import EVERY_CHANGE
from tests.decoding._bags import bag_of_words
from tests.decoding._models import decoder


@contextlib.contextmanager
def compiling():
    """A scheduler whose thread is inside a compilation, which lasts until the end."""
    policy = LogitPolicy(top_k=1)
    config = ServerConfig(
        model="bags", policy=policy, slots=2, max_length=16, prefill_rows=2, prefill_chunk=4
    )
    scheduler = Scheduler(Ensemble(bag_of_words(2, 16)), Disclosure(policy), (), config)
    over = threading.Event()

    def compile(**_):
        over.wait(60)
        raise InterruptedError("the test is over")

    scheduler.reader.compile = compile
    scheduler.start()
    try:
        yield scheduler
    finally:
        over.set()
        scheduler._thread.join(10)


def ask(scheduler):
    request = Request(prompt=[1], max_new_tokens=2)
    job = Job(request, Prompt(), asyncio.get_running_loop())
    scheduler.submit([job])
    return job


def test_answers_end_in_time_while_programs_are_being_compiled():
    async def ended():
        with compiling() as scheduler:
            jobs = [ask(scheduler) for _ in range(3)]
            assert not scheduler.draining
            scheduler.drain(0.2)
            assert scheduler.draining
            start = time.monotonic()
            async with asyncio.timeout(10):
                first = [await job.tokens.get() for job in jobs]
                took = time.monotonic() - start
                late = await ask(scheduler).tokens.get()
            return [*first, late], took

    reasons, took = asyncio.run(ended())
    assert reasons == ["length"] * 4
    assert 0.1 < took < 5


def test_an_end_does_not_wait_for_a_compilation():
    async def closed():
        with compiling() as scheduler:
            job = ask(scheduler)
            start = time.monotonic()
            scheduler.close()
            took = time.monotonic() - start
            async with asyncio.timeout(10):
                return await job.tokens.get(), took

    told, took = asyncio.run(closed())
    assert told.status == 503
    assert took < 5


def test_a_prompt_to_be_told_alone_has_to_fit_too():
    with compiling() as scheduler:
        engine = scheduler.engine
        for new in (0, 1):
            engine.streams_of(Request(prompt=[1] * 16, max_new_tokens=new))
            with pytest.raises(ValueError, match="do not fit max_length=16"):
                engine.streams_of(Request(prompt=[1] * 17, max_new_tokens=new))


def test_no_more_is_read_than_the_models_can():
    tiny = LineUp(model="tiny")
    for length in (512, None):
        assert serve._max_length(serve.Config(line_up=tiny, max_length=length)) == 512
    with pytest.raises(ValueError, match=r"max_length: expected at most 512, .* got 513"):
        serve.run(serve.Config(line_up=tiny, max_length=513))


class Slow:
    """A follower of a structure that takes its time or fails."""

    def __init__(self, seconds, failed=False):
        self.allowed = np.full(1, 0xFFFFFFFF, np.uint32)
        self.failed, self.field = False, "structured_outputs"
        self._seconds, self._fails = seconds, failed

    def take(self, _):
        time.sleep(self._seconds)
        self.failed = self._fails


@pytest.mark.every_change
def test_a_slow_structure_keeps_nobody_waiting_and_one_that_fails_ends():
    policy = LogitPolicy(returns="token")
    config = ServerConfig(model="bags", policy=policy, slots=3, max_length=32, prefill_chunk=4)
    scheduler = Scheduler(Ensemble(bag_of_words(3, 16)), Disclosure(policy), (), config)
    steps = [0]
    advance, decode = scheduler.reader.advance, scheduler.engine.decode_chunk

    def decode_chunk(count, *waits):
        steps[-1] += count
        return decode(count, *waits)

    scheduler.reader.advance = lambda: steps.append(0) or advance()
    scheduler.engine.decode_chunk = decode_chunk

    async def ask(*limits):
        async def read(job):
            received = []
            while not (received and (isinstance(received[-1], Exception) or received[-1].last)):
                received.append(await job.tokens.get())
            return received, time.monotonic()

        jobs = []
        for new, follower in limits:
            request = Request(prompt=[1], max_new_tokens=new)
            jobs.append(Job(request, Prompt(), asyncio.get_running_loop()))
            jobs[-1].follower = follower
        scheduler.submit(jobs)
        async with asyncio.timeout(60):
            return await asyncio.gather(*map(read, jobs))

    scheduler.start()
    try:
        (slow, at_last), (free, at_once), (failing, _) = asyncio.run(
            ask((4, Slow(0.4)), (24, None), (4, Slow(0, failed=True)))
        )
        steps[:] = [0]
        asyncio.run(ask((24, None), (24, Slow(0))))
    finally:
        scheduler.close()
    assert len(slow) == 4
    assert len(free) == 24
    # Three masks take longer than 24 free tokens.
    assert at_once < at_last - 0.3
    assert str(failing[-1]) == "structured_outputs: too complex"
    # Steps beside a structure are single ones: four of them lie between two looks at prompts.
    during = [count for i, count in enumerate(steps) if 0 < sum(steps[: i + 1]) < 20]
    assert min(during) >= 4


@pytest.mark.every_change
@pytest.mark.parametrize("draft", ["prompt", pytest.param("head", marks=EVERY_CHANGE)])
def test_drafted_answers_are_those_of_plain_decoding(draft):
    policy = LogitPolicy(returns="token")
    config = ServerConfig(model="bags", policy=policy, slots=2, max_length=32, prefill_chunk=4)
    model, prompts = Ensemble(bag_of_words(2, 16)), [[3, 4, 5, 3, 4, 5, 3, 4], [1, 2]]
    if draft == "head":
        # Its cache holds features, too, also of prompts that are read in pieces.
        model, draft = Ensemble(decoder()), DraftHead.of(decoder())
    drafts = DraftControl(draft, 2)
    scheduler = Scheduler(model, Disclosure(policy), (), config, drafts)

    async def ask():
        jobs = []
        for prompt in prompts:
            request = Request(prompt=prompt, max_new_tokens=12)
            jobs.append(Job(request, Prompt(), asyncio.get_running_loop()))
        scheduler.submit(jobs[:1])
        scheduler.submit(jobs[1:])
        async with asyncio.timeout(120):
            return [[await job.tokens.get() for _ in range(12)] for job in jobs]

    scheduler.start()
    try:
        answers = asyncio.run(ask())
    finally:
        scheduler.close()
    ids = [[token.id for token in tokens] for tokens in answers]
    assert ids == generate(model, prompts, max_new_tokens=12).rows()
    assert [[token.last for token in tokens] for tokens in answers] == [[False] * 11 + [True]] * 2
    stats = scheduler.engine.rounds.stats
    assert stats[2 if drafts.draft == "prompt" else 1].sum() > 0


@pytest.mark.parametrize("tokens", [[], [Token(3, None, ()), Token(5, None, ())]])
def test_a_row_without_probabilities_ends_in_an_error(tokens):
    received = []
    job = SimpleNamespace(follower=None, give=received.extend)
    # Not at an end mark, and with tokens left.
    state = SimpleNamespace(stopped=np.array([False]), left=np.array([4]))
    scheduler = SimpleNamespace(
        engine=SimpleNamespace(active=np.array([False]), state=state),
        _jobs=[job],
        _tokens=lambda emitted: [list(tokens)],
        _started=[time.monotonic()],
        _seconds=0.0,
    )
    Scheduler._hand_out(scheduler, None, [0])
    assert scheduler._jobs == [None]
    *given, error = received
    assert given == tokens
    assert (error.status, str(error)) == (500, "the model gave no probabilities")


def test_clients_that_left_do_not_wait():
    jobs = [[SimpleNamespace(cancelled=gone) for gone in group] for group in ([1, 0], [0], [1])]
    scheduler = SimpleNamespace(_waiting=jobs[:1], _reading={0: jobs[1], 1: jobs[2]})
    scheduler._behind = lambda: Scheduler._behind(scheduler)
    assert Scheduler._queued(scheduler) == 2
