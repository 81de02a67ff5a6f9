"""Texts to tokens and back, in the form of vLLM's `/tokenize` and `/detokenize`."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pydantic
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from logitjax.serving._admission import parse_json, prompt_tokens, read_body
from logitjax.serving._config import check_model
from logitjax.serving._errors import ApiError, BadRequestError, json_response
from logitjax.serving._keys import find_key
from logitjax.serving._schema import Message, TokenId, refusal
from logitjax.serving._service import Service


class _Text(pydantic.BaseModel, strict=True, extra="forbid"):
    """A text, or the messages of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class _Tokens(pydantic.BaseModel, strict=True, extra="forbid"):
    model: str | None = None
    tokens: list[TokenId]


def tokenize(service: Service, body: Any) -> dict[str, Any]:
    """The tokens that a request of the same text or messages would have."""
    asked = _checked(service, _Text, body)
    chat = asked.messages is not None
    if chat == (asked.prompt is not None):
        raise BadRequestError("prompt, messages: expected one of them", "prompt")
    special = not chat if asked.add_special_tokens is None else asked.add_special_tokens
    if chat:
        prompt: Any = [message.as_turn() for message in asked.messages]
    else:
        prompt = asked.prompt
    variables = {"add_generation_prompt": asked.add_generation_prompt is not False}
    variables = (asked.chat_template_kwargs or {}) | variables
    tokens = prompt_tokens(service, prompt, special, variables, chat=chat)
    names = [service.tokenizer.token(i) for i in tokens] if asked.return_token_strs else None
    most = service.config.max_length
    return {"count": len(tokens), "max_model_len": most, "tokens": tokens, "token_strs": names}


def detokenize(service: Service, body: Any) -> dict[str, Any]:
    """The text of tokens."""
    tokens = _checked(service, _Tokens, body).tokens
    wrong = [token for token in tokens if token >= service.vocab_size]
    if wrong:
        raise BadRequestError(f"tokens: there is no token {wrong[0]}", "tokens")
    return {"prompt": service.tokenizer.decode(tokens)}


def tokens_endpoint(service: Service, answer: Callable[[Service, Any], dict[str, Any]]) -> Any:
    """The endpoint of one of them; it takes its time off the event loop."""

    async def endpoint(http: HttpRequest) -> Response:
        config, loop = service.config, asyncio.get_running_loop()
        try:
            find_key(config.keys, http.headers.get("authorization", ""))
            body = await read_body(http, most=config.max_body_bytes, seconds=config.body_seconds)
            work = functools.partial(_answered, service, answer, body)
            return json_response(await loop.run_in_executor(service.readers, work))
        except ApiError as error:
            return error.response()
        except ClientDisconnect:
            return Response(status_code=499)

    return endpoint


def _answered(service: Service, answer: Callable[..., Any], body: bytes) -> Any:
    return answer(service, parse_json(body))


def _checked(service: Service, model: type[pydantic.BaseModel], body: Any) -> Any:
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, got {type(body).__name__}")
    try:
        asked: Any = model.model_validate(body)
    except pydantic.ValidationError as error:
        raise refusal(error) from None
    check_model(service.config, asked.model)
    return asked
