"""The two endpoints that decode, whole or as a stream."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from logitjax.serving import _schema as schema
from logitjax.serving._admission import make_jobs
from logitjax.serving._answer import Answer, frame, usage
from logitjax.serving._body import read_json
from logitjax.serving._errors import ApiError, json_response
from logitjax.serving._keys import find_key
from logitjax.serving._schema import CompletionRequest
from logitjax.serving._service import Service


def completions(service: Service, *, chat: bool) -> Any:
    """The endpoint of completions, or of chats."""

    async def endpoint(http: HttpRequest) -> Response:
        try:
            find_key(service.config.keys, http.headers.get("authorization", ""))
            body = await read_json(http, service.limits.max_body_bytes)
            asked = schema.parse(body, service.limits, chat=chat)
            jobs = make_jobs(service, asked)
            service.scheduler.submit([job for job, _ in jobs])
            service.metrics.prompt_tokens.inc(sum(len(prompt) for _, prompt in jobs))
        except ApiError as error:
            return error.response()
        except ClientDisconnect:
            return Response(status_code=499)
        answers = [
            Answer(service, asked, job, index, prompt) for index, (job, prompt) in enumerate(jobs)
        ]
        if asked.stream:
            return StreamingResponse(
                _stream(service, asked, answers), media_type="text/event-stream"
            )
        return await _whole(http, service, asked, answers)

    return endpoint


async def _whole(
    http: HttpRequest, service: Service, asked: CompletionRequest, answers: Sequence[Answer]
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
    except ApiError as error:
        return error.response()
    finally:
        watcher.cancel()
        everything.cancel()
        for answer in answers:
            answer.job.cancelled = True
    choices = []
    for answer in answers:
        choice: dict[str, Any] = {"index": answer.index}
        if asked.chat:
            choice["message"] = {"role": "assistant", "content": answer.text}
        else:
            choice["text"] = answer.text
        choice |= {"logprobs": answer.logprobs(answer.tokens), "finish_reason": answer.finish}
        choices.append(choice)
    head = frame(service, asked, chunk=False)
    return json_response(head | {"choices": choices, "usage": usage(answers, asked)})


async def _disconnected(http: HttpRequest) -> None:
    while not await http.is_disconnected():
        await asyncio.sleep(0.2)


async def _stream(
    service: Service, asked: CompletionRequest, answers: Sequence[Answer]
) -> AsyncIterator[str]:
    head = frame(service, asked, chunk=True)
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def follow(answer: Answer) -> None:
        try:
            async for text, tokens in answer.pieces():
                await queue.put((answer, text, tokens))
            await queue.put(answer)
        except ApiError as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(follow(answer)) for answer in answers]
    left = len(answers)
    try:
        if asked.chat:
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
            answer, text, tokens = item
            choice = {"index": answer.index, "logprobs": answer.logprobs(tokens)}
            choice["finish_reason"] = answer.finish if answer.tokens[-1] is tokens[-1] else None
            choice |= {"delta": {"content": text}} if asked.chat else {"text": text}
            yield _event(head | {"choices": [choice]})
        if asked.include_usage:
            yield _event(head | {"choices": [], "usage": usage(answers, asked)})
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        for answer in answers:
            answer.job.cancelled = True


def _event(body: Any) -> str:
    return f"data: {json.dumps(body)}\n\n"
