"""The application: its routes, and what is asked without decoding."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from logitjax.decoding import Ensemble
from logitjax.models import Tokenizer
from logitjax.serving._completions import completions
from logitjax.serving._config import ServerConfig, check_model
from logitjax.serving._errors import ApiError, json_response
from logitjax.serving._keys import find_key
from logitjax.serving._observed import Metrics, Observed
from logitjax.serving._openapi import openapi
from logitjax.serving._policy import Disclosure
from logitjax.serving._scheduler import Scheduler
from logitjax.serving._service import Service


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
    disclosure = Disclosure(config.policy, config.policy_seed)
    scheduler = Scheduler(
        model,
        disclosure,
        slots=config.slots,
        max_length=config.max_length,
        end_ids=end_ids,
        max_waiting=config.max_waiting,
    )
    metrics = Metrics(lambda: scheduler.load)
    service = Service(
        scheduler=scheduler,
        tokenizer=tokenizer,
        vocab_size=model.plan.vocab_size,
        end_ids=tuple(end_ids),
        config=config,
        disclosure=disclosure,
        metrics=metrics,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        service.scheduler.close()

    routes = [
        Route("/v1/completions", completions(service, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", completions(service, chat=True), methods=["POST"]),
        Route("/v1/models", _models(service), methods=["GET"]),
        Route("/v1/models/{name:path}", _models(service), methods=["GET"]),
        Route("/health", _health(service), methods=["GET"]),
        Route("/metrics", metrics.endpoint, methods=["GET"]),
        Route("/openapi.json", _description(service), methods=["GET"]),
    ]
    paths = frozenset(route.path for route in routes)
    middleware = [Middleware(Observed, metrics=metrics, paths=paths)]
    if config.allow_origins:
        cors: dict[str, Any] = {
            "allow_origins": config.allow_origins,
            "allow_methods": ["GET", "POST"],
            "allow_headers": ["*"],
            "expose_headers": ["x-request-id", "retry-after"],
        }
        middleware.append(Middleware(CORSMiddleware, **cors))
    handlers: Any = {HTTPException: _http_error, ApiError: _api_error}
    return Starlette(
        routes=routes, lifespan=lifespan, exception_handlers=handlers, middleware=middleware
    )


async def _http_error(_: HttpRequest, error: Any) -> Response:
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def _api_error(_: HttpRequest, error: Any) -> Response:
    return error.response()


def _models(service: Service) -> Any:
    async def endpoint(request: HttpRequest) -> Response:
        find_key(service.config.keys, request.headers.get("authorization", ""))
        entry = {
            "id": service.config.model,
            "object": "model",
            "created": 0,
            "owned_by": "logitjax",
        }
        asked = request.path_params.get("name")
        if asked is None:
            return json_response({"object": "list", "data": [entry]})
        check_model(service.config, asked)
        return json_response(entry)

    return endpoint


def _health(service: Service) -> Any:
    async def endpoint(_: HttpRequest) -> Response:
        if service.scheduler.failed is not None:
            raise ApiError(503, "the engine stopped")
        running, waiting = service.scheduler.load
        return json_response({"status": "ok", "running": running, "waiting": waiting})

    return endpoint


def _description(service: Service) -> Any:
    async def endpoint(_: HttpRequest) -> Response:
        return json_response(openapi(service.limits))

    return endpoint
