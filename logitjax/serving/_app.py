"""The HTTP side: OpenAI's completion and chat endpoints over a `Scheduler`."""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from logitjax.decoding import Ensemble, Request, Sampling, TextStream
from logitjax.models import Tokenizer
from logitjax.serving import _schema as schema
from logitjax.serving._config import ServerConfig, make_scheduler, prompt_extra
from logitjax.serving._scheduler import Job, OverloadedError, Scheduler, Token
from logitjax.serving._schema import BadRequestError, CompletionRequest, ServerLimits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """What the endpoints share."""

    scheduler: Scheduler
    tokenizer: Tokenizer
    vocab_size: int
    end_ids: tuple[int, ...]
    config: ServerConfig

    @property
    def limits(self) -> ServerLimits:
        return self.config.limits


def build_app(
    model: Ensemble, tokenizer: Tokenizer, end_ids: Sequence[int], config: ServerConfig
) -> Starlette:
    """The application of one model or several fused ones, ready for any ASGI server.

    It starts the decoding engine when it starts, and ends it with itself.

    Args:
        model: What decodes.
        tokenizer: Its tokenizer.
        end_ids: Tokens that end an answer.
        config: Limits, slots and the policy of what is reported.
    """
    service = Service(
        scheduler=make_scheduler(model, end_ids, config),
        tokenizer=tokenizer,
        vocab_size=model.plan.vocab_size,
        end_ids=tuple(end_ids),
        config=config,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        service.scheduler.close()

    routes = [
        Route("/v1/completions", _endpoint(service, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", _endpoint(service, chat=True), methods=["POST"]),
        Route("/v1/models", _models(service), methods=["GET"]),
        Route("/health", _health(service), methods=["GET"]),
        Route("/openapi.json", _description(service), methods=["GET"]),
    ]
    handlers: Any = {HTTPException: _http_error}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


def error_response(
    status: int, message: str, *, param: str | None = None, headers: Any = None
) -> Response:
    kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
    body = {
        "error": {
            "message": message,
            "type": kinds.get(status, "invalid_request_error"),
            "param": param,
            "code": None,
        }
    }
    return JSONResponse(body, status_code=status, headers=headers)


async def _http_error(_: HttpRequest, error: Any) -> Response:
    return error_response(error.status_code, str(error.detail), headers=error.headers)


def _refused(service: Service, request: HttpRequest) -> Response | None:
    if service.config.api_key is None:
        return None
    given = request.headers.get("authorization", "").encode()
    # In constant time: a comparison that stops early would tell the key letter by letter.
    if hmac.compare_digest(given, f"Bearer {service.config.api_key}".encode()):
        return None
    return error_response(401, "a wrong or missing API key", headers={"WWW-Authenticate": "Bearer"})


def _models(service: Service) -> Any:
    async def endpoint(request: HttpRequest) -> Response:
        refused = _refused(service, request)
        if refused is not None:
            return refused
        entry = {
            "id": service.config.model,
            "object": "model",
            "created": 0,
            "owned_by": "logitjax",
        }
        return JSONResponse({"object": "list", "data": [entry]})

    return endpoint


def _health(service: Service) -> Any:
    async def endpoint(_: HttpRequest) -> Response:
        if service.scheduler.failed is not None:
            return error_response(503, "the engine stopped")
        running, waiting = service.scheduler.load
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    return endpoint


def _description(service: Service) -> Any:
    async def endpoint(_: HttpRequest) -> Response:
        return JSONResponse(schema.openapi(service.limits))

    return endpoint


def _endpoint(service: Service, *, chat: bool) -> Any:
    async def endpoint(http: HttpRequest) -> Response:
        refused = _refused(service, http)
        if refused is not None:
            return refused
        try:
            body = await _read(http, service.limits.max_body_bytes)
            asked = schema.parse(body, service.limits, chat=chat)
            jobs = _jobs(service, asked)
            service.scheduler.submit([job for job, _ in jobs])
        except BadRequestError as error:
            return error_response(400, str(error), param=error.param)
        except OverloadedError as error:
            return error_response(429, str(error), headers={"Retry-After": str(error.retry_after)})
        except ClientDisconnect:
            return Response(status_code=499)
        except RuntimeError as error:
            return error_response(503, str(error))
        answers = [
            _Answer(service, asked, job, index, prompt) for index, (job, prompt) in enumerate(jobs)
        ]
        if asked.stream:
            return StreamingResponse(
                _stream(service, asked, answers), media_type="text/event-stream"
            )
        return await _whole(http, service, asked, answers)

    return endpoint


async def _read(http: HttpRequest, most: int) -> Any:
    kind = http.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"content-type must be application/json, got {kind!r}")
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413, f"the body is larger than {most} bytes")
        parts.append(part)
    try:
        return json.loads(b"".join(parts), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadRequestError("the body is not JSON") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _jobs(service: Service, asked: CompletionRequest) -> list[tuple[Job, Sequence[int]]]:
    if asked.model not in (None, "", service.config.model):
        raise HTTPException(404, f"the model is {service.config.model!r}, not {asked.model[:60]!r}")
    wrong = [i for i in asked.logit_bias if i >= service.vocab_size]
    if wrong:
        raise BadRequestError(f"logit_bias: there is no token {wrong[0]}", "logit_bias")
    loop = asyncio.get_running_loop()
    jobs = []
    for number, prompt in enumerate(asked.prompts):
        tokens = _tokens(service, prompt, asked.chat)
        if len(tokens) + asked.max_tokens - 1 > service.config.max_length:
            raise BadRequestError(
                f"{len(tokens)} prompt tokens and max_tokens={asked.max_tokens} do not fit "
                f"{service.config.max_length}",
                "messages" if asked.chat else "prompt",
            )
        for copy in range(asked.n):
            seed = secrets.randbits(32) if asked.seed is None else asked.seed
            seed = (seed + number * asked.n + copy) % 2**32
            sampling = Sampling(
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
                min_p=asked.min_p,
                repetition_penalty=asked.repetition_penalty,
                seed=seed,
            )
            request = Request(
                prompt=tokens,
                max_new_tokens=asked.max_tokens,
                sampling=sampling,
                stop_ids=service.end_ids,
                logit_bias=asked.logit_bias or None,
                extra=prompt_extra(tokens, service.config.policy),
            )
            jobs.append((Job(request, loop), tokens))
    return jobs


def _tokens(service: Service, prompt: Any, chat: bool) -> list[int]:
    name = "messages" if chat else "prompt"
    if chat:
        try:
            prompt = service.tokenizer.render_chat(prompt, add_generation_prompt=True)
        except ValueError as error:
            raise BadRequestError(str(error), name) from None
    if isinstance(prompt, str):
        try:
            tokens = service.tokenizer.encode(prompt)
        except (TypeError, UnicodeError):  # Lone surrogates, which JSON can spell.
            raise BadRequestError(f"{name} is not valid Unicode", name) from None
    else:
        tokens = list(prompt)
    if not tokens:
        raise BadRequestError(f"{name} has no token", name)
    wrong = [i for i in tokens if i >= service.vocab_size]
    if wrong:
        raise BadRequestError(f"there is no token {wrong[0]}", name)
    return tokens


class _Answer:
    """One choice of an answer: collects tokens, text and log-probabilities."""

    def __init__(
        self,
        service: Service,
        asked: CompletionRequest,
        job: Job,
        index: int,
        prompt: Sequence[int],
    ):
        self.job = job
        self.index = index
        self.prompt_tokens = len(prompt)
        self.finish: str | None = None
        self.tokens: list[Token] = []
        self.text = ""
        self._service = service
        self._asked = asked
        self._stream = TextStream(service.tokenizer, asked.stop)
        self._offset = 0

    async def pieces(self) -> AsyncIterator[tuple[str, list[Token]]]:
        """Text that has become certain, and the tokens that came with it."""
        while self.finish is None:
            item = await self.job.tokens.get()
            if isinstance(item, Exception):
                self.finish = "error"
                raise item
            self.tokens.append(item)
            # The end-of-text token ends the answer and is no part of its text.
            text = "" if item.stopped else self._stream.push([item.id])
            if self._stream.stopped:
                self.finish = "stop"
                self.job.cancelled = not item.last
            elif item.last:
                self.finish = "stop" if item.stopped else "length"
                text += self._stream.finish()
            self.text += text
            yield text, [item]

    def logprobs(self, tokens: Sequence[Token]) -> Any:
        if self._asked.logprobs is None:
            return None
        return (self._chat_logprobs if self._asked.chat else self._completion_logprobs)(tokens)

    def _name(self, token: int) -> str:
        if self._asked.tokens_as_ids:
            return f"token_id:{token}"
        return self._service.tokenizer.decode([token])

    def _completion_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        names = [self._name(t.id) for t in tokens]
        offsets = []
        for name in names:
            offsets.append(self._offset)
            self._offset += len(name)
        few = self._asked.logprobs or 0
        tops = [{self._name(i): p for i, p in t.top[:few]} for t in tokens]
        return {
            "tokens": names,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": tops if few else None,
            "text_offset": offsets,
        }

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def entry(id: int, logprob: float | None) -> dict[str, Any]:
            name = self._name(id)
            return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

        few = self._asked.logprobs or 0
        content = [
            entry(t.id, t.logprob) | {"top_logprobs": [entry(i, p) for i, p in t.top[:few]]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


def _usage(answers: Sequence[_Answer], asked: CompletionRequest) -> dict[str, int]:
    # Copies of one prompt are read once as far as the user is concerned.
    prompt = sum(a.prompt_tokens for a in answers[:: asked.n])
    new = sum(len(a.tokens) for a in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _frame(service: Service, asked: CompletionRequest, *, chunk: bool) -> dict[str, Any]:
    kind = "chat.completion" if asked.chat else "text_completion"
    return {
        "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": f"{kind}.chunk" if chunk and asked.chat else kind,
        "created": int(time.time()),
        "model": service.config.model,
    }


async def _whole(
    http: HttpRequest, service: Service, asked: CompletionRequest, answers: Sequence[_Answer]
) -> Response:
    async def collect(answer: _Answer) -> None:
        async for _ in answer.pieces():
            pass

    everything = asyncio.gather(*map(collect, answers))
    watcher = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({everything, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            return Response(status_code=499)
        everything.result()
    except (ValueError, TypeError) as error:
        return error_response(400, str(error))
    except RuntimeError as error:
        return error_response(503, str(error))
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
    frame = _frame(service, asked, chunk=False)
    return JSONResponse(frame | {"choices": choices, "usage": _usage(answers, asked)})


async def _disconnected(http: HttpRequest) -> None:
    while not await http.is_disconnected():
        await asyncio.sleep(0.2)


async def _stream(
    service: Service, asked: CompletionRequest, answers: Sequence[_Answer]
) -> AsyncIterator[str]:
    frame = _frame(service, asked, chunk=True)
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def follow(answer: _Answer) -> None:
        try:
            async for text, tokens in answer.pieces():
                await queue.put((answer, text, tokens))
            await queue.put(answer)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(follow(answer)) for answer in answers]
    left = len(answers)
    try:
        if asked.chat:
            for answer in answers:
                delta = {"role": "assistant", "content": ""}
                choice = {"index": answer.index, "delta": delta, "finish_reason": None}
                yield _event(frame | {"choices": [choice]})
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                yield _event({"error": {"message": str(item), "type": "server_error"}})
                return
            if isinstance(item, _Answer):
                left -= 1
                continue
            answer, text, tokens = item
            choice = {"index": answer.index, "logprobs": answer.logprobs(tokens)}
            choice["finish_reason"] = answer.finish if answer.tokens[-1] is tokens[-1] else None
            choice |= {"delta": {"content": text}} if asked.chat else {"text": text}
            yield _event(frame | {"choices": [choice]})
        if asked.include_usage:
            yield _event(frame | {"choices": [], "usage": _usage(answers, asked)})
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        for answer in answers:
            answer.job.cancelled = True


def _event(body: Any) -> str:
    return f"data: {json.dumps(body)}\n\n"
