"""The API's own description, for clients, fuzzers and people."""

from typing import Any

from pydantic import BaseModel

from logitjax.serving._config import ServerConfig
from logitjax.serving._schema import request_model


class ErrorDetail(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """The body of every refusal."""

    error: ErrorDetail


_REF = "#/components/schemas/{model}"


def openapi(config: ServerConfig) -> dict[str, Any]:
    """The API's description, for clients, fuzzers and people."""
    schemas: dict[str, Any] = {}

    def described(model: type[BaseModel]) -> dict[str, str]:
        schema = model.model_json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
        return {"$ref": _REF.format(model=model.__name__)}

    refused = {
        "description": "What is wrong with the request.",
        "content": {"application/json": {"schema": described(Error)}},
    }
    answer = {
        "description": "Done; server-sent events where stream is true.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }

    def post(summary: str, *, chat: bool) -> dict[str, Any]:
        schema = described(request_model(config, chat=chat))
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        codes = ("400", "401", "404", "413", "415", "429")
        responses = {"200": answer, **dict.fromkeys(codes, refused)}
        return {"post": {"summary": summary, "requestBody": body, "responses": responses}}

    def get(summary: str, *codes: str) -> dict[str, Any]:
        responses = {"200": {"description": summary}} | dict.fromkeys(codes, refused)
        return {"get": {"summary": summary, "responses": responses}}

    return {
        "openapi": "3.1.0",
        "info": {"title": "logitjax completions", "version": "1"},
        "paths": {
            "/v1/completions": post("Goes on from a prompt.", chat=False),
            "/v1/chat/completions": post("Answers a conversation.", chat=True),
            "/v1/models": get("What is served.", "401"),
            "/health": get("Whether it still decodes.", "503"),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
