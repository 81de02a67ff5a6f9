"""Bodies of requests."""

import asyncio
import json
import re
from typing import Any

from starlette.requests import Request as HttpRequest

from logitjax.serving._errors import ApiError, BadRequestError

# No field takes a number this long, and Python's integers would carry it into every check.
_LONG_NUMBER = re.compile(rb"[0-9]{25}")


async def read_body(http: HttpRequest, *, most: int, seconds: float) -> bytes:
    """The bytes that a request brings."""
    kind = http.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type must be application/json, got {kind[:60]!r}")
    said = http.headers.get("content-length", "")
    if said.isascii() and said.isdigit() and (len(said) > 18 or int(said) > most):
        raise _too_large(most)
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in http.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
    except TimeoutError:
        raise ApiError(
            408, f"the body took longer than {seconds:g} s", headers={"Connection": "close"}
        ) from None
    return b"".join(parts)


def parse_json(body: bytes) -> Any:
    """What JSON bytes say.

    Raises:
        BadRequestError: They are no JSON, nested too deeply, or hold a number that is too long.
    """
    options: dict[str, Any] = {"parse_constant": _no_constant}
    if _LONG_NUMBER.search(body):
        # Only then: a function of our own for each number takes its time.
        options |= dict.fromkeys(("parse_int", "parse_float"), _number)
    try:
        return json.loads(body, **options)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadRequestError):
            raise
        raise BadRequestError("the body is not JSON") from None


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", headers={"Connection": "close"})


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _number(digits: str) -> int | float:
    whole = digits.lstrip("-").isdigit()
    if len(digits) > (24 if whole else 400):
        raise BadRequestError(f"a number of {len(digits)} digits is too long")
    return int(digits) if whole else float(digits)
