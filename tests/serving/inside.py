"""Requests to an application in this process, without a socket."""

import asyncio
import contextlib
import json
from typing import Any


async def call(app, path, body=None, *, key=None, method="POST") -> tuple[int, Any]:
    """``(status, decoded body)``; of a stream the list of its events."""
    raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = [(b"content-type", b"application/json")]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
    }
    sent, parts, status = False, [], []

    async def receive():
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": raw, "more_body": False}

    async def send(message):
        if message["type"] == "http.response.start":
            status.append(message["status"])
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    text = b"".join(parts).decode(errors="replace")
    if "\0" in text:  # Tensors are no JSON.
        return status[0], text
    if text.startswith("data: "):
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        return status[0], [json.loads(event) for event in events if event != "[DONE]"]
    return status[0], json.loads(text)


@contextlib.asynccontextmanager
async def running(app):
    """The application between its start and its end."""
    async with app.router.lifespan_context(app):
        yield app
