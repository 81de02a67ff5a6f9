"""The application: its routes, and the endpoints that do not decode."""

import contextlib
import copy
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

import logitjax
from logitjax.decoding import DraftControl, Ensemble
from logitjax.models import Tokenizer
from logitjax.serving._accounts import Accounts
from logitjax.serving._admission import longest_token
from logitjax.serving._completions import completions
from logitjax.serving._config import ServerConfig, check_model
from logitjax.serving._errors import ApiError, json_response
from logitjax.serving._formats import Formats
from logitjax.serving._hidden_states import HiddenStates
from logitjax.serving._keys import find_key
from logitjax.serving._names import TokenNames
from logitjax.serving._observed import Metrics, Observed
from logitjax.serving._policy import Disclosure
from logitjax.serving._scheduler import Scheduler
from logitjax.serving._schema import openapi
from logitjax.serving._service import Service
from logitjax.serving._tokens import detokenize, tokenize, tokens_endpoint

# Processor seconds; thousands of ordinary messages take one.
_TEMPLATE_SECONDS = 0.5


def build_app(
    model: Ensemble,
    tokenizer: Tokenizer,
    end_ids: Sequence[int],
    config: ServerConfig,
    *,
    drafts: DraftControl | None = None,
) -> Starlette:
    """Build the application of one model or several fused ones, ready for any ASGI server.

    The decoding engine starts and stops with the application. The tokens `end_ids` end an answer.
    `drafts` are used when they pay, for answers without a schema.
    """
    # Its template processes messages of strangers.
    tokenizer = copy.copy(tokenizer)
    tokenizer.template_seconds = _TEMPLATE_SECONDS
    disclosure = Disclosure(
        config.policy, config.policy_seed, choices=config.choices, schemas=config.schemas
    )
    scheduler = Scheduler(model, disclosure, end_ids, config, drafts)
    metrics = Metrics(lambda: scheduler.load)
    service = Service(
        scheduler=scheduler,
        tokenizer=tokenizer,
        names=TokenNames(tokenizer),
        vocab_size=model.plan.vocab_size,
        end_ids=tuple(end_ids),
        config=config,
        disclosure=disclosure,
        metrics=metrics,
        accounts=Accounts(config.keys, config.audit_log, config.nats),
        readers=ThreadPoolExecutor(2, "reader"),
        formats=Formats(tokenizer, model.plan.vocab_size, end_ids),
        most_characters=config.max_length * longest_token(tokenizer),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        scheduler.start()
        service.formats.start()
        yield
        scheduler.close()
        service.formats.close()
        service.readers.shutdown(wait=False, cancel_futures=True)
        service.accounts.close()

    routes = [
        Route("/v1/completions", completions(service, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", completions(service, chat=True), methods=["POST"]),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _models),
        Route("/health", _health),
        Route("/ready", _ready),
        Route("/tokenize", tokens_endpoint(service, tokenize), methods=["POST"]),
        Route("/detokenize", tokens_endpoint(service, detokenize), methods=["POST"]),
        Route("/version", _version),
        Route("/metrics", metrics.endpoint),
        Route("/openapi.json", _description),
    ]
    if config.hidden_states:
        states = HiddenStates(service, model.decoder)
        scheduler.compiles.append(states.compile)
        routes.append(Route("/v1/hidden_states", states.endpoint, methods=["GET", "POST"]))
    paths = frozenset(route.path for route in routes)
    middleware = [Middleware(Observed, metrics=metrics, paths=paths)]
    if config.allow_origins:
        cors: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        cors["expose_headers"] = ["x-request-id", "retry-after"]
        middleware.append(Middleware(CORSMiddleware, allow_origins=config.allow_origins, **cors))
    handlers: Any = {HTTPException: _http_error, ApiError: _api_error, Exception: _mistake}
    handlers[ClientDisconnect] = _left
    app = Starlette(
        routes=routes, lifespan=lifespan, exception_handlers=handlers, middleware=middleware
    )
    app.state.service = service
    return app


async def _http_error(_: HttpRequest, error: Any) -> Response:
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def _api_error(_: HttpRequest, error: Any) -> Response:
    return error.response()


async def _left(_: HttpRequest, error: Any) -> Response:
    return Response(status_code=499)


async def _mistake(_: HttpRequest, error: Exception) -> Response:
    # The exception propagates from here, is logged, and ends the connection.
    return ApiError(500, "internal server error", headers={"Connection": "close"}).response()


def _service(request: HttpRequest) -> Service:
    return request.app.state.service


async def _models(request: HttpRequest) -> Response:
    config = _service(request).config
    find_key(config.keys, request.headers.get("authorization", ""))
    entry = {"id": config.model, "object": "model", "created": 0, "owned_by": "logitjax"}
    name = request.path_params.get("name")
    if name is None:
        return json_response({"object": "list", "data": [entry]})
    check_model(config, name)
    return json_response(entry)


async def _health(request: HttpRequest) -> Response:
    scheduler = _service(request).scheduler
    if scheduler.failed is not None:
        raise ApiError(503, "the engine stopped")
    running, waiting = scheduler.load
    return json_response({"status": "ok", "running": running, "waiting": waiting})


async def _ready(request: HttpRequest) -> Response:
    scheduler = _service(request).scheduler
    if scheduler.failed is not None:
        raise ApiError(503, "the engine stopped")
    if scheduler.draining:
        raise ApiError(503, "the server is stopping")
    if not scheduler.ready.is_set():
        raise ApiError(503, "programs are being compiled", headers={"Retry-After": "5"})
    return json_response({"status": "ready"})


async def _version(_: HttpRequest) -> Response:
    return json_response({"version": logitjax.__version__})


async def _description(request: HttpRequest) -> Response:
    return json_response(openapi(_service(request).config))
