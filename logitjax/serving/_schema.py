"""Requests of the completion API: what is accepted, and its description for machines."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


class BadRequestError(ValueError):
    """A request that cannot be answered; ``param`` is the field at fault."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What one request may ask for."""

    max_tokens: int = 512
    max_logprobs: int = 5
    max_prompts: int = 16
    max_logit_bias: int = 300
    bias_limit: float = 100.0
    max_body_bytes: int = 1 << 20
    logit_bias: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A validated request, prompts still as they came."""

    prompts: Sequence[str | Sequence[int]]
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    logprobs: int | None
    logit_bias: Mapping[int, float]
    stop: Sequence[str]
    stream: bool
    include_usage: bool
    tokens_as_ids: bool
    model: str | None
    chat: bool


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRequestError(f"{name} must be a number, got {_short(value)}", name)
    if not low <= value <= high:
        raise BadRequestError(f"{name} must be between {low:g} and {high:g}, got {value:g}", name)
    return float(value)


def _integer(
    body: Mapping[str, Any], name: str, default: int | None, low: int, high: int
) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequestError(f"{name} must be an integer, got {_short(value)}", name)
    if not low <= value <= high:
        raise BadRequestError(f"{name} must be between {low} and {high}, got {value}", name)
    return value


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise BadRequestError(f"{name} must be true or false, got {_short(value)}", name)
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def parse(body: Any, limits: ServerLimits, *, chat: bool) -> CompletionRequest:
    """A request from JSON.

    Raises:
      BadRequestError: naming the field, what was expected and what came.
    """
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, got {_short(body)}")
    for name, neutral in (
        ("frequency_penalty", 0),
        ("presence_penalty", 0),
        ("echo", False),
        ("suffix", None),
        ("tools", None),
        ("response_format", None),
    ):
        if body.get(name) not in (None, neutral, []):
            raise BadRequestError(f"{name} is not supported", name)
    if body.get("best_of") not in (None, 1):
        raise BadRequestError("best_of is not supported", "best_of")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequestError(f"model must be a string, got {_short(model)}", "model")
    top = limits.max_logprobs
    if chat:
        prompts: Sequence[Any] = [_messages(body.get("messages"))]
        shown = _integer(body, "top_logprobs", 0, 0, top)
        logprobs = shown if _boolean(body, "logprobs") else None
        if logprobs is None and shown:
            raise BadRequestError("top_logprobs needs logprobs", "top_logprobs")
    else:
        prompts = _prompts(body.get("prompt"), limits)
        logprobs = _integer(body, "logprobs", None, 0, top)
    longest = _integer(body, "max_tokens", None, 1, limits.max_tokens)
    if chat:
        longest = _integer(body, "max_completion_tokens", longest, 1, limits.max_tokens)
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequestError("stream_options must be an object", "stream_options")
    n = _integer(body, "n", None, 1, limits.max_prompts) or 1
    if n * len(prompts) > limits.max_prompts:
        raise BadRequestError(
            f"at most {limits.max_prompts} answers a request, got {n} for each of "
            f"{len(prompts)} prompts",
            "n",
        )
    return CompletionRequest(
        prompts=prompts,
        n=n,
        max_tokens=longest or min(limits.max_tokens, 64 if chat else 16),
        temperature=_number(body, "temperature", 1.0, 0.0, 2.0),
        top_p=_probability(body),
        top_k=_integer(body, "top_k", 0, 0, 1 << 30) or 0,
        min_p=_number(body, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(body, "repetition_penalty", 1.0, 0.1, 10.0),
        seed=_integer(body, "seed", None, 0, 2**32 - 1),
        logprobs=logprobs,
        logit_bias=_bias(body.get("logit_bias"), limits),
        stop=_stop(body.get("stop")),
        stream=_boolean(body, "stream"),
        include_usage=_boolean(options or {}, "include_usage"),
        tokens_as_ids=_boolean(body, "return_tokens_as_token_ids"),
        model=model,
        chat=chat,
    )


def _probability(body: Mapping[str, Any]) -> float:
    value = _number(body, "top_p", 1.0, 0.0, 1.0)
    if value == 0:
        raise BadRequestError("top_p must be above 0", "top_p")
    return value


def _prompts(prompt: Any, limits: ServerLimits) -> list[Any]:
    if isinstance(prompt, str):
        found: list[Any] = [prompt]
    elif isinstance(prompt, list) and prompt and all(_is_token(x) for x in prompt):
        found = [prompt]
    elif isinstance(prompt, list) and prompt:
        found = list(prompt)
        for one in found:
            tokens = isinstance(one, list) and one and all(_is_token(x) for x in one)
            if not isinstance(one, str) and not tokens:
                raise BadRequestError(
                    f"prompt must hold strings or lists of token ids, got {_short(one)}", "prompt"
                )
    else:
        raise BadRequestError(
            f"prompt must be a string, a list of strings or token ids, got {_short(prompt)}",
            "prompt",
        )
    if any(not one for one in found):
        raise BadRequestError("prompt must not be empty", "prompt")
    if len(found) > limits.max_prompts:
        raise BadRequestError(f"at most {limits.max_prompts} prompts, got {len(found)}", "prompt")
    return found


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _messages(messages: Any) -> Any:
    if not isinstance(messages, list) or not messages:
        raise BadRequestError("messages must be a list that is not empty", "messages")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise BadRequestError(
                f"messages must have a role and a content, both strings, got {_short(message)}",
                "messages",
            )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _bias(bias: Any, limits: ServerLimits) -> dict[int, float]:
    if bias is None or bias == {}:
        return {}
    if not limits.logit_bias:
        raise BadRequestError("this server takes no logit_bias", "logit_bias")
    if not isinstance(bias, dict):
        raise BadRequestError(
            f"logit_bias must be an object from token id to number, got {_short(bias)}",
            "logit_bias",
        )
    if len(bias) > limits.max_logit_bias:
        raise BadRequestError(
            f"at most {limits.max_logit_bias} tokens may be biased, got {len(bias)}", "logit_bias"
        )
    found = {}
    for key in bias:
        # Only plain digits: int() would take ' 1', '1_0' and digits of other scripts too.
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise BadRequestError(f"logit_bias: {_short(key)} is not a token id", "logit_bias")
        found[int(key)] = _number(bias, key, 0.0, -limits.bias_limit, limits.bias_limit)
    return found


def _stop(stop: Any) -> list[str]:
    if stop is None:
        return []
    found = [stop] if isinstance(stop, str) else stop
    if not isinstance(found, list) or not all(isinstance(s, str) and s for s in found):
        raise BadRequestError("stop must be a string or a list of them, none empty", "stop")
    if len(found) > 4:
        raise BadRequestError(f"at most 4 stop strings, got {len(found)}", "stop")
    return list(found)


def openapi(limits: ServerLimits) -> dict[str, Any]:
    """The API's description, for clients, fuzzers and people."""
    error = {
        "description": "What is wrong with the request.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["message", "type"],
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                                "param": {"type": ["string", "null"]},
                                "code": {"type": ["string", "null"]},
                            },
                        }
                    },
                }
            }
        },
    }
    answer = {
        "description": "Done; server-sent events where stream is true.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
    shared: dict[str, Any] = {
        "model": {"type": "string"},
        "n": {"type": "integer", "minimum": 1, "maximum": limits.max_prompts},
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": limits.max_tokens},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": "integer", "minimum": 0},
        "min_p": {"type": "number", "minimum": 0, "maximum": 1},
        "repetition_penalty": {"type": "number", "minimum": 0.1, "maximum": 10},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
        "stop": {
            "oneOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
            ]
        },
        "stream": {"type": "boolean"},
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {
                "type": "number",
                "minimum": -limits.bias_limit,
                "maximum": limits.bias_limit,
            },
            "maxProperties": limits.max_logit_bias,
        },
        "return_tokens_as_token_ids": {"type": "boolean"},
    }
    token = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
    text = {"type": "string", "minLength": 1}
    tokens = {"type": "array", "items": token, "minItems": 1}
    several = {"type": "array", "items": {"anyOf": [text, tokens]}, "minItems": 1}
    completion = shared | {
        "prompt": {"anyOf": [text, tokens, several | {"maxItems": limits.max_prompts}]},
        "logprobs": {"type": "integer", "minimum": 0, "maximum": limits.max_logprobs},
    }
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
    }
    chat = shared | {
        "messages": {"type": "array", "items": message, "minItems": 1},
        "logprobs": {"type": "boolean"},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": limits.max_logprobs},
    }

    def post(summary: str, properties: Any, required: str) -> dict[str, Any]:
        schema = {"type": "object", "required": [required], "properties": properties}
        return {
            "post": {
                "summary": summary,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": schema}},
                },
                "responses": {
                    "200": answer,
                    **dict.fromkeys(("400", "401", "404", "413", "415", "429"), error),
                },
            }
        }

    def get(summary: str, *codes: str) -> dict[str, Any]:
        found = {"200": {"description": summary}} | dict.fromkeys(codes, error)
        return {"get": {"summary": summary, "responses": found}}

    return {
        "openapi": "3.1.0",
        "info": {"title": "logitjax completions", "version": "1"},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/v1/completions": post("Goes on from a prompt.", completion, "prompt"),
            "/v1/chat/completions": post("Answers a conversation.", chat, "messages"),
            "/v1/models": get("What is served.", "401"),
            "/health": get("Whether it still decodes.", "503"),
        },
    }
