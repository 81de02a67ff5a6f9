"""Models that servers are tried with, and clients of a server over HTTP and in this process."""

import asyncio
import http.client
import json
import pathlib
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


def connect(address: str, timeout: float = 120.0) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(address.removeprefix("http://"), timeout=timeout)


def post(connection: http.client.HTTPConnection, body: Any) -> tuple[int, Any, bytes]:
    """Status, headers and text of a completion request; ``body`` JSON or bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", COMPLETIONS, raw, JSON)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


async def call(
    app: Any, body: Any, *, path: str = COMPLETIONS, method: str = "POST"
) -> tuple[int, Any]:
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
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    return status, json.loads(b"".join(parts))
