"""The listening side: a cap on connections, time-outs, and a shutdown that lets answers end."""

import asyncio
import contextlib
import dataclasses
import math
import os
import resource
import socket
from typing import Any

import uvicorn
from absl import logging
from starlette.applications import Starlette

from logitjax.ops import checks
from logitjax.serving._connections import Doorkeeper, Protocol
from logitjax.serving._errors import ApiError

# Descriptors reserved for files, the accelerator and connections that are being closed.
_SPARE = 64
_BACKLOG = 1024
# Seconds that a connection without a request has to send one during shutdown.
_LAST_SECONDS = 1.0
# Seconds between two checks whether the engine has started.
_LOOK_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listening:
    """The address of a server, and the limits of its connections.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        connections: Maximum number of simultaneous connections; fewer if the process may open fewer
            files.
        idle_seconds: Maximum number of seconds that a connection may be open without a complete
            request head, or keep sending a body after its answer.
        discard_bytes: Maximum number of bytes of a body to read and discard after its answer.
        request_seconds: Maximum number of seconds for a client to read an answer.
        drain_seconds: Maximum number of seconds that answers may continue after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    connections: int = 512
    idle_seconds: float = 15.0
    discard_bytes: int = 64 << 20
    request_seconds: float = 600.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        checks.between(self.port, 0, 65535, "port")
        checks.between(self.connections, 1, 2**31 - 1, "connections")

    def serve(self, app: Starlette) -> None:
        """Serve an application of `build_app` until a signal; prints one line with the address.

        After SIGTERM or SIGINT, answers continue for at most `drain_seconds` and then end as
        `length`. OSError if the address is unavailable, RuntimeError if the engine died first.
        """
        with contextlib.closing(_listener(self)) as listener:
            doorkeeper = Doorkeeper(_most_connections(self), self.idle_seconds)
            server = _Server(app, self, listener, doorkeeper)
            host = f"[{self.host}]" if ":" in self.host else self.host
            print(f"listening on http://{host}:{listener.getsockname()[1]}", flush=True)
            server.run()
        scheduler = app.state.service.scheduler
        if scheduler.failed is not None and not scheduler.ready.is_set():
            raise RuntimeError("the engine stopped before it was ready") from scheduler.failed


def _listener(listening: Listening) -> socket.socket:
    result = socket.getaddrinfo(
        listening.host, listening.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, *_, address = min(result, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


def _most_connections(listening: Listening) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    expected = listening.connections + 2 * _SPARE
    if soft != resource.RLIM_INFINITY and soft < expected:
        soft = expected if hard == resource.RLIM_INFINITY else min(hard, expected)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return listening.connections
    with contextlib.suppress(OSError):
        soft -= len(os.listdir("/proc/self/fd"))
    most = min(listening.connections, soft - _SPARE)
    if most < 1:
        raise OSError(f"connections: expected room for one, got {soft} descriptors")
    if most < listening.connections:
        logging.info("%d connections at once: no more files may be open", most)
    return most


class _Server(uvicorn.Server):
    """Uvicorn with its own accept loop: asyncio's accepts everybody and stops without files."""

    def __init__(
        self, app: Starlette, listening: Listening, listener: socket.socket, keeper: Doorkeeper
    ):
        kept = {"doorkeeper": keeper, "discard_bytes": listening.discard_bytes}
        protocol: Any = type("_Kept", (Protocol,), kept)
        super().__init__(
            uvicorn.Config(
                _with_deadline(app, listening.request_seconds),
                http=protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_level="warning",
                access_log=False,
                timeout_keep_alive=int(listening.idle_seconds) + 1,
                # One more second for answers that ended at the limit to be sent.
                timeout_graceful_shutdown=math.ceil(listening.drain_seconds) + 1,
            )
        )
        self._app, self._listening = app, listening
        self._listener, self._keeper = listener, keeper
        self._tasks: list[asyncio.Task] = []

    async def startup(self, sockets: Any = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise SystemExit(1)
        self.servers = []
        self._tasks = [
            asyncio.create_task(self._accept()),
            asyncio.create_task(self._keeper.sweep()),
            asyncio.create_task(self._until_ready()),
        ]
        self.started = True

    async def shutdown(self, sockets: Any = None) -> None:
        accepting, *others = self._tasks
        accepting.cancel()
        # A client in the backlog has a connection and may have sent a request.
        with contextlib.suppress(OSError):
            for _ in range(_BACKLOG):
                await self._let_in(self._listener.accept()[0])
        self._listener.close()
        self._keeper.idle_seconds = min(self._keeper.idle_seconds, _LAST_SECONDS)
        self._app.state.service.scheduler.drain(self._listening.drain_seconds)
        await super().shutdown()
        for task in others:
            task.cancel()

    async def _until_ready(self) -> None:
        """Stop a server whose engine never starts: it would listen forever and answer nothing."""
        scheduler = self._app.state.service.scheduler
        while not scheduler.ready.is_set() and not self.should_exit:
            self.should_exit = scheduler.failed is not None
            await asyncio.sleep(_LOOK_SECONDS)

    async def _accept(self) -> None:
        loop, keeper = asyncio.get_running_loop(), self._keeper
        while True:
            # While all connections are busy, new clients wait in the backlog.
            while keeper.full and not keeper.turn_out():
                await asyncio.sleep(0.05)
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError:  # Out of descriptors: who waits in the backlog comes in later.
                keeper.turn_out()
                await asyncio.sleep(0.05)
                continue
            # The shutdown came between two connections.
            await asyncio.shield(self._let_in(connection))

    async def _let_in(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            # asyncio does so only for sockets that name their protocol; without it a head and a
            # body in two pieces wait 40 ms for each other.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        return make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def _with_deadline(app: Any, seconds: float) -> Any:
    """Close the connection of a client that has not read its answer for this long."""

    async def limited(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        begun = False

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(seconds):
                await app(scope, receive, noted)
        except TimeoutError:
            if not begun:
                late = ApiError(408, f"the request took longer than {seconds:g} s")
                await late.response()(scope, receive, send)

    return limited
