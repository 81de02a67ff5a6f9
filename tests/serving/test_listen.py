"""A server among connections that say nothing, and at its end."""

import asyncio
import concurrent.futures
import contextlib
import json
import signal
import socket
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from logitjax.serving import Listening
from logitjax.serving._connections import Doorkeeper
from logitjax.serving._listen import _Server
from tests.serving._server import post, server

COMPLETIONS = "/v1/completions"


def half_open(address, count):
    """Connections that begin a request and never end it."""
    host, port = address.removeprefix("http://").split(":")
    connections = []
    for i in range(count):
        connection = socket.create_connection((host, int(port)), timeout=10)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX: "[: 1 + 9 * (i % 6)])
        connections.append(connection)
    return connections


def stream(address, seed):
    """The events of one long answer."""
    body = {"prompt": "a", "max_tokens": 400, "stream": True, "seed": seed, "temperature": 2}
    request = urllib.request.Request(
        address + COMPLETIONS, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = [line.decode().strip() for line in answer if line.strip()]
    return [line.removeprefix("data: ") for line in lines]


async def refuse(request):
    """Answers without a look at the body."""
    closes = {"Connection": "close"} if request.url.path == "/closes" else {}
    return PlainTextResponse("no", 401, closes)


def started():
    """The decoding thread, as far as a server needs it."""
    ready = threading.Event()
    ready.set()
    return SimpleNamespace(drain=lambda seconds: None, ready=ready, failed=None)


@contextlib.asynccontextmanager
async def refusing(keeper=None, scheduler=None, **options):
    """A server in this process that refuses everything, and its port in front."""
    app = Starlette(routes=[Route("/{path:path}", refuse, methods=["POST"])])
    app.state.service = SimpleNamespace(scheduler=scheduler or started())
    options_given = Listening(port=0, **options)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        keeper = keeper or Doorkeeper(options_given.connections, options_given.idle_seconds)
        server = _Server(app, options_given, listener, keeper)
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup()
        try:
            yield listener.getsockname()[1], server
        finally:
            for task in server._tasks:
                task.cancel()
            await server.lifespan.shutdown()


def ask(port, path, size, *, pause=0.0, pieces=16):
    """The answer to a client that reads only once it has sent everything."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n"
        connection.sendall(head.encode())
        for _ in range(pieces):
            time.sleep(pause)
            connection.sendall(b" " * (size // pieces))
        received = b""
        while not received.endswith((b"no", b"}}")):
            received += connection.recv(1 << 16) or b"}}"
        return received


@pytest.mark.parametrize("path", ["/closes", "/keeps"])
def test_who_still_sends_a_refused_body_reads_why(path):
    async def fifty():
        async with refusing() as (port, _):
            return [
                await asyncio.to_thread(ask, port, path, 160_000, pause=0.0005) for _ in range(50)
            ]

    for answer in asyncio.run(fifty()):
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert answer.endswith(b"no")


def test_what_is_no_http_is_refused_in_json():
    def garbage(port):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")
            received = b""
            while part := connection.recv(1 << 16):
                received += part
            return received

    async def asked():
        async with refusing() as (port, _):
            return await asyncio.to_thread(garbage, port)

    head, _, body = asyncio.run(asked()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_who_comes_when_all_connections_are_busy_waits_for_one():
    async def crowd():
        # Nobody waits for a request, so that nobody can be turned out.
        keeper = Doorkeeper(0, 15.0)
        async with refusing(keeper=keeper) as (port, _):
            asking = [asyncio.to_thread(ask, port, "/keeps", 160) for _ in range(3)]
            together = asyncio.gather(*asking)
            await asyncio.sleep(0.3)
            waited, keeper.most = not together.done(), 1
            return waited, await together

    waited, answers = asyncio.run(crowd())
    assert waited
    assert all(answer.startswith(b"HTTP/1.1 401 ") for answer in answers)


@pytest.mark.parametrize("path", ["/closes", "/keeps"])
def test_a_refused_body_is_read_for_so_many_bytes_and_so_long(path):
    async def too_much(size, **options):
        async with refusing(**options) as (port, _):
            with pytest.raises(OSError, match=r"reset|[Bb]roken"):
                await asyncio.to_thread(ask, port, path, size, pause=0.05)

    asyncio.run(too_much(1_600_000, discard_bytes=200_000))
    asyncio.run(too_much(160, idle_seconds=0.2))


def test_who_has_asked_before_the_end_is_answered():
    async def end():
        async with refusing() as (port, server):
            server._tasks[0].cancel()  # Nobody is let in, as where a loop is too busy for it.
            await asyncio.sleep(0.05)
            # A thread each: of the loop's own there are six on two cores, and two would come late.
            loop, pool = asyncio.get_running_loop(), concurrent.futures.ThreadPoolExecutor(8)
            asking = [loop.run_in_executor(pool, ask, port, "/keeps", 160) for _ in range(8)]
            silent = socket.create_connection(("127.0.0.1", port), timeout=10)
            await asyncio.sleep(0.5)
            start = time.monotonic()
            await server.shutdown()
            silent.close()
            return await asyncio.gather(*asking), time.monotonic() - start

    answers, seconds = asyncio.run(end())
    assert [answer[:13] for answer in answers] == [b"HTTP/1.1 401 "] * 8
    assert seconds < 5


@pytest.mark.every_change
@pytest.mark.slow
def test_half_open_connections_keep_nobody_out_and_a_signal_ends_answers():
    flags = ("--model=tiny", "--max_length=512", "--max_tokens=400", "--slots=2")
    limits = ("--drain_seconds=0.5", "--idle_seconds=1")
    with server(*flags, *limits, files=192) as (address, process):
        with contextlib.ExitStack() as stack:
            for connection in half_open(address, 250):
                stack.enter_context(connection)
            for _ in range(3):
                body = {"prompt": "a", "max_tokens": 2, "temperature": 0}
                assert post(address, COMPLETIONS, body)[0] == 200
            # Those that are still there are turned out by time.
            connection.settimeout(10)
            assert connection.recv(1) == b""
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            running = [pool.submit(stream, address, seed) for seed in range(12)]
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            answers = [each.result() for each in running]
        for events in answers:
            assert events[-1] == "[DONE]"
            last = json.loads(events[-2])
            assert last["choices"][0]["finish_reason"] in ("length", "stop")
        process.wait(timeout=30)
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"{address}/health", timeout=5)


def test_a_server_whose_engine_dies_before_it_is_ready_ends():
    scheduler = started()
    scheduler.ready.clear()

    async def ended():
        async with refusing(scheduler=scheduler) as (_, server):
            await asyncio.sleep(0.5)
            assert not server.should_exit
            scheduler.failed = ValueError("a strategy needs a base")
            async with asyncio.timeout(10):
                while not server.should_exit:
                    await asyncio.sleep(0.05)

    asyncio.run(ended())


def test_the_end_of_such_a_server_is_an_error(monkeypatch):
    scheduler = started()
    scheduler.ready.clear()
    scheduler.failed = ValueError("a strategy needs a base")
    app = Starlette()
    app.state.service = SimpleNamespace(scheduler=scheduler)
    with pytest.raises(RuntimeError, match="stopped before it was ready") as error:
        Listening(port=0).serve(app)
    assert error.value.__cause__ is scheduler.failed
