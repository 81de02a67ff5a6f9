"""Bodies of requests."""

import json
from typing import Any

from starlette.requests import Request as HttpRequest

from logitjax.serving._errors import ApiError, BadRequestError


async def read_json(http: HttpRequest, most: int) -> Any:
    """The JSON that a request brings.

    Raises:
        ApiError: It is none, or too much.
    """
    kind = http.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type must be application/json, got {kind!r}")
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size > most:
            raise ApiError(413, f"the body is larger than {most} bytes")
        parts.append(part)
    try:
        return json.loads(b"".join(parts), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadRequestError("the body is not JSON") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
