"""A server among connections that say nothing, and at its end."""

import concurrent.futures
import contextlib
import json
import signal
import socket
import time
import urllib.request

import pytest

from tests.serving._server import post, server

COMPLETIONS = "/v1/completions"


def half_open(address, count):
    """Connections that begin a request and never end it."""
    host, port = address.removeprefix("http://").split(":")
    found = []
    for i in range(count):
        connection = socket.create_connection((host, int(port)), timeout=10)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX: "[: 1 + 9 * (i % 6)])
        found.append(connection)
    return found


def stream(address, seed):
    """The events of one long answer."""
    body = {"prompt": "a", "max_tokens": 400, "stream": True, "seed": seed, "temperature": 2}
    request = urllib.request.Request(
        address + COMPLETIONS, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = [line.decode().strip() for line in answer if line.strip()]
    return [line.removeprefix("data: ") for line in lines]


@pytest.mark.every_change
@pytest.mark.slow
def test_half_open_connections_keep_nobody_out_and_a_signal_ends_answers():
    flags = ("--model=tiny", "--max_length=512", "--max_tokens=400", "--slots=2", "--drain=0.5")
    with server(*flags, "--idle_timeout=1", files=192) as (address, process):
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
