"""Observability for operators: request ids, and counts and times for Prometheus."""

import re
import secrets
import time
from collections.abc import Callable
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

_HEADER = "x-request-id"
# From the first token of a toy to the last one of a long answer on a CPU.
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
# An id goes into logs and headers unchanged.
_ID = re.compile(rb"[\w.:/+=-]{1,128}")


class Metrics:
    """Counts and times of one server; `load` returns the busy slots and waiting requests."""

    def __init__(self, load: Callable[[], tuple[int, int]]):
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry, "namespace": "logitjax"}
        self.requests = Counter("requests", "Requests.", ["path", "status"], **options)
        until = "Time until the last byte of an answer."
        self.seconds = Histogram("request_seconds", until, ["path"], buckets=_SECONDS, **options)
        until = "Time from a checked request to its first token."
        self.first_token = Histogram("first_token_seconds", until, buckets=_SECONDS, **options)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **options)
        self.new_tokens = Counter("completion_tokens", "Tokens of answers.", **options)
        notes = "Upper bound on the nats revealed by metered answers."
        self.told_nats = Counter("told_nats", notes, **options)
        self.open = Gauge("requests_open", "Requests in progress.", **options)
        Gauge("slots_busy", "Slots taken.", **options).set_function(lambda: load()[0])
        waiting = Gauge("requests_waiting", "Requests without a slot.", **options)
        waiting.set_function(lambda: load()[1])

    async def endpoint(self, _: HttpRequest) -> Response:
        text = prometheus_client.generate_latest(self.registry)
        return Response(text, media_type="text/plain; version=0.0.4")


class Observed:
    """ASGI middleware: counts answers and gives each an `X-Request-Id`, the client's if valid.

    Starlette's base class would read streams on its own task and hide that a client has left.
    """

    def __init__(self, app: Any, metrics: Metrics, paths: frozenset[str]):
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header = dict(scope["headers"]).get(_HEADER.encode(), b"")
        name = header if _ID.fullmatch(header) else f"req-{secrets.token_hex(12)}".encode()
        scope.setdefault("state", {})["request_id"] = name.decode()
        # All other paths are counted as one; otherwise strangers could create new series.
        path = scope["path"] if scope["path"] in self._paths else "other"
        # If nothing is sent, the client has left.
        status = 499
        start = time.monotonic()

        async def observed_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (_HEADER.encode(), name)]
                message = message | {"headers": headers}
            await send(message)

        with self._metrics.open.track_inprogress():
            try:
                await self._app(scope, receive, observed_send)
            except Exception:
                # Sent by the surrounding middleware.
                status = 500
                raise
            finally:
                self._metrics.requests.labels(path, status).inc()
                self._metrics.seconds.labels(path).observe(time.monotonic() - start)
