"""The two endpoints that decode, in one answer or as a stream."""

import asyncio
import collections
import functools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from logitjax.serving._admission import read_body, read_request
from logitjax.serving._answer import Answer, frame, usage
from logitjax.serving._errors import ApiError, json_response
from logitjax.serving._schema import CompletionRequest
from logitjax.serving._service import Service


def completions(service: Service, *, chat: bool) -> Any:
    async def endpoint(http: HttpRequest) -> Response:
        loop = asyncio.get_running_loop()
        key, body = await read_body(service, http)
        # Off the event loop: long prompts take long to check and to encode.
        read = functools.partial(read_request, service, body, key, loop, chat=chat)
        request, jobs = await loop.run_in_executor(service.readers, read)
        if request.sampling.structure is not None:
            about = (*request.sampling.structure, request.sampling.structure_field)
            follower = await service.formats.follow(*about)
            for job, _ in jobs:
                job.follower = follower.copy()
        prompt_tokens = sum(len(prompt) for _, prompt in jobs[:: request.n])
        answers = [Answer(service, request, job, i, p) for i, (job, p) in enumerate(jobs)]
        meters = [answer.meter for answer in answers if answer.meter is not None]
        tokens, nats = prompt_tokens + len(jobs) * request.max_tokens, sum(m.most for m in meters)
        reserved = service.accounts.reserve(key, queries=len(jobs), tokens=tokens, nats=nats)
        try:
            service.scheduler.submit([job for job, _ in jobs])
            # After queueing, so that an overload costs no nats; nothing is shown in between.
            for meter in meters:
                meter.begin()
        except ApiError:
            for job, _ in jobs:
                job.cancelled = True
            service.accounts.settle(reserved, tokens=0, record=None)
            raise
        service.metrics.prompt_tokens.inc(prompt_tokens)

        def done() -> None:
            for answer in answers:
                answer.job.cancelled = True
            total = sum(answer.values for answer in answers)
            request_id, fields = getattr(http.state, "request_id", None), request.sampling
            record = {"request": request_id, "prompt_tokens": prompt_tokens, "values": total}
            record |= {"top": request.logprobs, "temperature": fields.temperature}
            record |= {"biased": len(fields.logit_bias)}
            new = sum(len(answer.tokens) for answer in answers)
            nats = sum((meter.told for meter in meters), collections.Counter())
            service.metrics.told_nats.inc(nats.total())
            used = prompt_tokens + new
            service.accounts.settle(reserved, tokens=used, record=record, contexts=nats)

        if request.stream:
            return _Events(_stream(service, request, answers), done)
        try:
            return await _whole(http, service, request, answers)
        finally:
            done()

    return endpoint


class _Events(StreamingResponse):
    """Server-sent events; `done` is called however the stream ends, even before it began."""

    def __init__(self, events: AsyncIterator[str], done: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream")
        self._done = done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


async def _whole(
    http: HttpRequest, service: Service, request: CompletionRequest, answers: Sequence[Answer]
) -> Response:
    async def collect(answer: Answer) -> None:
        async for _ in answer.pieces():
            pass

    everything = asyncio.gather(*map(collect, answers))
    watcher = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({everything, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            return Response(status_code=499)
        everything.result()
    finally:
        watcher.cancel()
        everything.cancel()
    choices = []
    for answer in answers:
        message = {"message": {"role": "assistant", "content": answer.text}}
        choice: dict[str, Any] = {"index": answer.index}
        choice |= message if request.chat else {"text": answer.text}
        choice |= {"logprobs": answer.logprobs(answer.shown), "finish_reason": answer.finish}
        if request.prompt_logprobs is not None and not request.chat:
            choice["prompt_logprobs"] = _prompt_logprobs(service, request, answer)
        choices.append(choice)
    body = frame(service, request, chunk=False) | {"choices": choices}
    if request.prompt_logprobs is not None and request.chat:
        body["prompt_logprobs"] = _prompt_logprobs(service, request, answers[0])
    return json_response(body | {"usage": usage(answers, request)})


def _prompt_logprobs(service: Service, request: CompletionRequest, answer: Answer) -> list[Any]:
    """For each prompt token the most likely ones and its own, by id as in vLLM."""
    # Nothing predicts the first token.
    places: list[Any] = [None]
    for token in answer.job.prompt_report:
        best = [(*pair, rank) for rank, pair in enumerate(token.top, 1)]
        items: list[tuple[int, float, int | None]] = [*best[: request.prompt_logprobs]]
        if token.logprob is not None and token.id not in [id for id, *_ in items]:
            # Its rank is known if it is among those that any request may see.
            ranks = [rank for id, _, rank in best if id == token.id]
            items.append((token.id, token.logprob, ranks[0] if ranks else None))
        named = [(id, {"logprob": value, "rank": rank}) for id, value, rank in items]
        places.append({str(i): one | {"decoded_token": service.names(i)[0]} for i, one in named})
    return places


async def _disconnected(http: HttpRequest) -> None:
    # Nothing follows a body. `is_disconnected` would have to be polled.
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    service: Service, request: CompletionRequest, answers: Sequence[Answer]
) -> AsyncIterator[str]:
    head = frame(service, request, chunk=True)
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def follow(answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                await queue.put((answer, *piece))
            await queue.put(answer)
        except ApiError as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(follow(answer)) for answer in answers]
    left = len(answers)
    try:
        if request.chat:
            for answer in answers:
                delta = {"role": "assistant", "content": ""}
                choice = {"index": answer.index, "delta": delta, "finish_reason": None}
                yield _event(head | {"choices": [choice]})
        while left:
            item = await queue.get()
            if isinstance(item, ApiError):
                yield _event(item.body())
                return
            if isinstance(item, Answer):
                left -= 1
                continue
            answer, text, tokens, reason = item
            choice = {"index": answer.index, "logprobs": answer.logprobs(tokens)}
            choice["finish_reason"] = reason
            choice |= {"delta": {"content": text}} if request.chat else {"text": text}
            counts = {"usage": usage(answers, request)} if request.continuous_usage else {}
            yield _event(head | {"choices": [choice]} | counts)
        if request.include_usage:
            yield _event(head | {"choices": [], "usage": usage(answers, request)})
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()


def _event(body: Any) -> str:
    return f"data: {json.dumps(body)}\n\n"
