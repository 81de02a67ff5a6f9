"""The listening side: a cap on connections, time-outs, and an end that lets answers end."""

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from absl import logging
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from logitjax.serving._errors import ApiError

# Descriptors left for files, the accelerator and connections that are just being closed.
_SPARE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a server listens, and for how long it bears with a connection.

    Attributes:
        host: Address.
        port: Port; 0 takes a free one.
        connections: Most connections at once; fewer where the process may open fewer files.
        idle_seconds: How long a connection may be open without a whole request head, or go on
            sending a body after its answer.
        discard_bytes: Most bytes of a body that are read after its answer, and thrown away.
        request_seconds: How long an answer may take to be read.
        drain_seconds: How long answers may go on after the signal to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    connections: int = 512
    idle_seconds: float = 15.0
    discard_bytes: int = 64 << 20
    request_seconds: float = 600.0
    drain_seconds: float = 30.0


def run_server(app: Starlette, listening: Listening) -> None:
    """Answers until a signal ends it, and says where in one line.

    SIGTERM and SIGINT let what is under way go on for `drain_seconds`; it then ends with the
    reason `length`.

    Args:
        app: Of `build_app`.
        listening: Where, and how long.

    Raises:
        OSError: The address cannot be had.
    """
    with contextlib.closing(_listener(listening)) as listener:
        doorkeeper = _Doorkeeper(_most_connections(listening), listening.idle_seconds)
        server = _Server(app, listening, listener, doorkeeper)
        host = f"[{listening.host}]" if ":" in listening.host else listening.host
        print(f"listening on http://{host}:{listener.getsockname()[1]}", flush=True)
        server.run()


def _listener(listening: Listening) -> socket.socket:
    found = socket.getaddrinfo(
        listening.host, listening.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.create_server(address, family=family, backlog=1024)
    listener.setblocking(False)
    return listener


def _most_connections(listening: Listening) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = listening.connections + 2 * _SPARE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
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


class _Doorkeeper:
    """Knows every connection, and which of them wait for a request, the longest first."""

    def __init__(self, most: int, idle_seconds: float):
        self.most = most
        self.idle_seconds = idle_seconds
        self.open: set[Any] = set()
        self._idle: collections.OrderedDict[Any, float] = collections.OrderedDict()

    @property
    def full(self) -> bool:
        return len(self.open) >= self.most

    def note(self, connection: Any, *, busy: bool) -> None:
        """Whether it waits for a request; a byte more of one's head renews nothing."""
        self.open.add(connection)
        if busy:
            self._idle.pop(connection, None)
        elif connection not in self._idle:
            self._idle[connection] = time.monotonic()

    def forget(self, connection: Any) -> None:
        self.open.discard(connection)
        self._idle.pop(connection, None)

    def turn_out(self, *, older_than: float = 0.0) -> bool:
        """Closes the connection that has waited longest, so that somebody else may come in."""
        if not self._idle:
            return False
        connection, since = next(iter(self._idle.items()))
        if time.monotonic() - since < older_than:
            return False
        self.forget(connection)
        connection.transport.abort()
        return True

    async def sweep(self) -> None:
        """Turns out those that have waited too long, for ever."""
        while True:
            while self.turn_out(older_than=self.idle_seconds):
                pass
            await asyncio.sleep(min(1.0, self.idle_seconds / 4))


class _HalfClosing:
    """A transport that, closed while the client still sends, only says that its answer is whole.

    To close a socket that holds unread bytes resets the connection, and many clients send all of a
    body before they read: they would see a broken pipe in place of the reason for it.

    Args:
        transport: Of a connection.
        sending: Whether more is to come from the client.
    """

    def __init__(self, transport: Any, sending: Callable[[], bool]):
        self._transport = transport
        self._sending = sending
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        self.lingers = self._sending()
        if self.lingers:
            self._transport.resume_reading()
            with contextlib.suppress(OSError):  # The client has gone.
                self._transport.write_eof()
        else:
            self._transport.close()


class _Protocol(H11Protocol):
    """HTTP of uvicorn that tells a doorkeeper whether it waits for a request.

    What a client sends of a body after its answer is thrown away, up to `discard_bytes`; the
    doorkeeper bounds for how long.
    """

    doorkeeper: _Doorkeeper
    discard_bytes: int

    def connection_made(self, transport: Any) -> None:
        self._discarded = 0
        super().connection_made(_HalfClosing(transport, self._sending))  # pyright: ignore[reportArgumentType]
        self.doorkeeper.note(self, busy=False)

    def data_received(self, data: bytes) -> None:
        if self._sending() and not self._busy:
            self._discarded += len(data)
            if self._discarded > self.discard_bytes:
                self.transport.abort()
        else:
            self._discarded = 0
        if not self.transport.is_closing():
            super().data_received(data)
            self._note()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # It has its answer, or a part of it.
            return
        super().send_400_response(msg)
        if self.cycle is not None:  # It waits for the rest of what was no body.
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note()

    def connection_lost(self, exc: Exception | None) -> None:
        self.doorkeeper.forget(self)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def _sending(self) -> bool:
        """Whether the client is inside a body, or has sent what is no HTTP."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    @property
    def _busy(self) -> bool:
        cycle = self.cycle
        return cycle is not None and not (cycle.response_complete or cycle.disconnected)

    def _note(self) -> None:
        transport: Any = self.transport
        if transport.lingers or not transport.is_closing():
            self.doorkeeper.note(self, busy=self._busy)


class _Refusal(asyncio.Protocol):
    """Says that there are too many connections, and ends when the client has read it.

    Args:
        doorkeeper: Of those that are being refused.
        discard_bytes: Most bytes of the request that are read, and thrown away.
    """

    def __init__(self, doorkeeper: _Doorkeeper, discard_bytes: int):
        self.transport: Any = None
        self._doorkeeper = doorkeeper
        self._left = discard_bytes

    def connection_made(self, transport: Any) -> None:
        if self._doorkeeper.full:
            self._doorkeeper.turn_out()
        self.transport = transport
        self._doorkeeper.note(self, busy=False)
        transport.write(_FULL)
        with contextlib.suppress(OSError):  # The client has gone.
            transport.write_eof()

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._doorkeeper.forget(self)


class _Server(uvicorn.Server):
    """Uvicorn with a door of its own: asyncio's lets in all that come, and stops without files."""

    def __init__(
        self, app: Starlette, listening: Listening, listener: socket.socket, keeper: _Doorkeeper
    ):
        kept = {"doorkeeper": keeper, "discard_bytes": listening.discard_bytes}
        protocol: Any = type("_Kept", (_Protocol,), kept)
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
                timeout_graceful_shutdown=int(listening.drain_seconds) + 10,
            )
        )
        self._app = app
        self._listening = listening
        self._listener = listener
        self._keeper = keeper
        # They hold files too, out of those that are spared.
        self._refused = _Doorkeeper(_SPARE // 2, listening.idle_seconds)
        self._tasks: list[asyncio.Task] = []

    async def startup(self, sockets: Any = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise SystemExit(1)
        self.servers = []
        self._tasks = [
            asyncio.create_task(self._accept()),
            asyncio.create_task(self._keeper.sweep()),
            asyncio.create_task(self._refused.sweep()),
        ]
        self.started = True

    async def shutdown(self, sockets: Any = None) -> None:
        accepting, *sweeping = self._tasks
        accepting.cancel()
        self._listener.close()
        self._app.state.service.scheduler.drain(self._listening.drain_seconds)
        await super().shutdown()
        for task in sweeping:
            task.cancel()

    async def _accept(self) -> None:
        loop, keeper = asyncio.get_running_loop(), self._keeper
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError:  # Out of descriptors: who waits in the backlog comes in later.
                keeper.turn_out()
                await asyncio.sleep(0.05)
                continue
            full = keeper.full and not keeper.turn_out()
            with contextlib.suppress(OSError):
                # asyncio does so only to sockets that name their protocol; without it a head and
                # a body in two pieces wait 40 ms for each other.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                protocol = self._refusal if full else self._protocol
                await loop.connect_accepted_socket(protocol, connection)

    def _refusal(self) -> asyncio.Protocol:
        return _Refusal(self._refused, self._listening.discard_bytes)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        return make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def _with_deadline(app: Any, seconds: float) -> Any:
    """A client that does not read its answer is left alone after so long."""

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


def _full() -> bytes:
    error = ApiError(429, "too many connections", code="overloaded")
    body = json.dumps(error.body()).encode()
    head = (
        "HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


_FULL = _full()
