"""Errors of requests, in the form of OpenAI's API."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_SERVER = {500: "server_error", 503: "server_error"}
_KINDS = {401: "authentication_error", 429: "rate_limit_error"} | _SERVER


class ApiError(Exception):
    """A refusal for the client: `param` is the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error")
        detail = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": detail}

    def response(self) -> Response:
        return json_response(self.body(), status=self.status, headers=self.headers)


class BadRequestError(ApiError, ValueError):
    """A request that cannot be answered; `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(400, message, param=param)


def json_response(
    body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON in ASCII, in which a lone surrogate, which JSON can spell, is not an error."""
    return Response(
        json.dumps(body), status_code=status, headers=headers, media_type="application/json"
    )
