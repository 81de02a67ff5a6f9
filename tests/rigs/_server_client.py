"""Servers of our own, in a process or in this one, and clients of them."""

import asyncio
import contextlib
import http.client
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from flax import nnx

from logitjax import models
from logitjax.models import Decoder, DecoderConfig, save_pretrained

COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}


def small_decoder(vocab: int) -> Decoder:
    """One layer: what is measured is what lies around it."""
    config = DecoderConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_length=1024,
    )
    return Decoder(config, rngs=nnx.Rngs(0), layout="listed")


def small_model(directory: pathlib.Path, vocab: int) -> Decoder:
    """`small_decoder` on disk, as any model is."""
    model = small_decoder(vocab)
    save_pretrained(model, models.load_tokenizer("tiny"), directory)
    return model


@contextlib.contextmanager
def running(
    *arguments: str, files: int | None = None, python: str = sys.executable
) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server on a free loopback port, once it is ready; ended at the end.

    Another interpreter runs what is installed for it, not the files that lie here.
    """
    command = [python, "-m", "logitjax", "serve", "--port=0", *arguments]
    environment = dict(os.environ)
    if python != sys.executable:
        command.insert(1, "-P")
        environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    if files is not None:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files, files))
    try:
        assert process.stdout is not None
        said = process.stdout.readline().split()
        if not said:
            raise RuntimeError(f"the server ended with {process.wait()}")
        address = said[-1]
        for _ in range(3000):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/ready", timeout=2)
                break
            time.sleep(0.2)
        yield address, process
    finally:
        process.terminate()
        process.wait(timeout=60)


def connect(address: str, timeout: float = 120.0) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(address.removeprefix("http://"), timeout=timeout)


def post(connection: http.client.HTTPConnection, body: Any) -> tuple[int, Any, bytes]:
    """Status, headers and text of a completion request; ``body`` JSON or bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", COMPLETIONS, raw, JSON)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


async def call(app: Any, body: Any) -> tuple[int, Any]:
    """The same to an application in this process, without HTTP."""
    raw, sent = json.dumps(body).encode(), False
    status, parts = 0, []

    async def receive() -> Any:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": raw, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "method": "POST",
        "path": COMPLETIONS,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    return status, json.loads(b"".join(parts))
