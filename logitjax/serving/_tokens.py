"""Texts to tokens and back, like vLLM's `/tokenize` and `/detokenize`."""

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from logitjax.serving import _schema as schema
from logitjax.serving._admission import parse_json, prompt_tokens, read_body
from logitjax.serving._config import check_model
from logitjax.serving._errors import BadRequestError, json_response
from logitjax.serving._service import Service


def tokenize(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """Tokens of the prompt in a request with these fields."""
    spelt, chat = body.pop("return_token_strs", None), "messages" in body
    request = schema.parse(body, service.config, chat=chat)
    check_model(service.config, request.model)
    tokens = prompt_tokens(service, request, request.prompts[0])
    names = [service.tokenizer.token(token) for token in tokens] if spelt else None
    most = service.config.max_length
    return {"count": len(tokens), "max_model_len": most, "tokens": tokens, "token_strs": names}


def detokenize(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or body.keys() - {"model", "tokens"}:
        raise BadRequestError("tokens: expected a list of ids and no field but model", "tokens")
    wrong = [i for i in tokens if type(i) is not int or not 0 <= i < service.vocab_size]
    if wrong:
        raise BadRequestError(f"tokens: there is no token {str(wrong[0])[:60]}", "tokens")
    return {"prompt": service.tokenizer.decode(tokens)}


def tokens_endpoint(
    service: Service, answer: Callable[[Service, dict[str, Any]], dict[str, Any]]
) -> Any:
    """The endpoint of either; it runs off the event loop because it is slow."""

    def work(body: bytes) -> dict[str, Any]:
        content = parse_json(body)
        if not isinstance(content, dict):
            raise BadRequestError("the body must be a JSON object")
        return answer(service, content)

    async def endpoint(http: HttpRequest) -> Response:
        _, body = await read_body(service, http)
        loop = asyncio.get_running_loop()
        return json_response(await loop.run_in_executor(service.readers, work, body))

    return endpoint
