"""Connections: time limits of clients and of the server, and bodies that are not needed."""

import asyncio
import collections
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from logitjax.serving._errors import ApiError


class Doorkeeper:
    """Tracks all connections, and which of them wait for a request, the longest first."""

    def __init__(self, most: int, idle_seconds: float):
        self.most, self.idle_seconds = most, idle_seconds
        self.open: set[Any] = set()
        self._idle: collections.OrderedDict[Any, float] = collections.OrderedDict()

    @property
    def full(self) -> bool:
        return len(self.open) >= self.most

    def note(self, connection: Any, *, busy: bool) -> None:
        """Note whether it waits for a request; another byte of a head does not restart the time."""
        self.open.add(connection)
        if busy:
            self._idle.pop(connection, None)
        elif connection not in self._idle:
            self._idle[connection] = time.monotonic()

    def forget(self, connection: Any) -> None:
        self.open.discard(connection)
        self._idle.pop(connection, None)

    def turn_out(self, *, older_than: float = 0.0) -> bool:
        """Close the connection that has waited longest, to make room for another."""
        if not self._idle:
            return False
        connection, since = next(iter(self._idle.items()))
        if time.monotonic() - since < older_than:
            return False
        self.forget(connection)
        connection.transport.abort()
        return True

    async def sweep(self) -> None:
        """Keep closing connections that have waited too long."""
        while True:
            while self.turn_out(older_than=self.idle_seconds):
                pass
            await asyncio.sleep(min(1.0, self.idle_seconds / 4))


class _HalfClosing:
    """A transport that, closed while the client is `sending`, only signals the end of its answer.

    Closing a socket with unread bytes resets it, and clients still sending miss the answer.
    """

    def __init__(self, transport: Any, sending: Callable[[], bool]):
        self._transport, self._sending, self.lingers = transport, sending, False

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
            # The client has gone.
            with contextlib.suppress(OSError):
                self._transport.write_eof()
        else:
            self._transport.close()


class Protocol(H11Protocol):
    """HTTP of uvicorn that tells a doorkeeper when it waits, and discards a body sent too late."""

    doorkeeper: Doorkeeper
    discard_bytes: int

    def connection_made(self, transport: Any) -> None:
        self._discarded, self._last = 0, False
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
            if self._last and self.cycle is not None:
                self.cycle.keep_alive = False
            self._note()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # The client has its answer, or part of it.
            self.transport.abort()
            return
        body = json.dumps(ApiError(400, msg).body()).encode()
        headers = {"content-type": "application/json", "connection": "close"}
        headers["content-length"] = str(len(body))
        response = h11.Response(status_code=400, headers=list(headers.items()))
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        # It waits for the rest of an invalid body.
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note()

    def connection_lost(self, exc: Exception | None) -> None:
        self.doorkeeper.forget(self)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """End after the answer in progress, or after answering a request that is not read yet."""
        self._last = True
        if self._busy:
            super().shutdown()

    def _sending(self) -> bool:
        """Whether the client is in the middle of a body, or has sent something other than HTTP."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    @property
    def _busy(self) -> bool:
        cycle = self.cycle
        return cycle is not None and not (cycle.response_complete or cycle.disconnected)

    def _note(self) -> None:
        transport: Any = self.transport
        if transport.lingers or not transport.is_closing():
            self.doorkeeper.note(self, busy=self._busy)
