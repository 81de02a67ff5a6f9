"""Conversion of a request's bytes to jobs: fields, tokens, lengths, seeds."""

import asyncio
import dataclasses
import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest

from logitjax.decoding import Request, Sampling
from logitjax.models import Tokenizer
from logitjax.serving import _schema as schema
from logitjax.serving._config import check_model
from logitjax.serving._errors import ApiError, BadRequestError
from logitjax.serving._keys import Key, find_key
from logitjax.serving._scheduler import Job, Prompt
from logitjax.serving._schema import CompletionRequest, SamplingFields
from logitjax.serving._service import Service

# No field takes a number this long, and Python's integers would carry it into every check.
_LONG_NUMBER = re.compile(rb"[0-9]{25}")


async def read_body(service: Service, http: HttpRequest) -> tuple[Key, bytes]:
    """The client's key, and the bytes of its request."""
    config = service.config
    key, most = find_key(config.keys, http.headers.get("authorization", "")), config.max_body_bytes
    kind = http.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type must be application/json, got {kind[:60]!r}")
    message = http.headers.get("content-length", "")
    if message.isascii() and message.isdigit() and (len(message) > 18 or int(message) > most):
        raise _too_large(most)
    parts, size = [], 0
    try:
        async with asyncio.timeout(config.body_seconds):
            async for part in http.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
    except TimeoutError:
        late = f"the body took longer than {config.body_seconds:g} s"
        raise ApiError(408, late, headers={"Connection": "close"}) from None
    return key, b"".join(parts)


def parse_json(body: bytes) -> Any:
    """Parse JSON; excessive nesting and overlong numbers are refused."""
    options: dict[str, Any] = {"parse_constant": _no_constant}
    if _LONG_NUMBER.search(body):
        # Only on demand: a Python function for each number takes time.
        options |= dict.fromkeys(("parse_int", "parse_float"), _number)
    try:
        return json.loads(body, **options)
    except BadRequestError:
        raise
    except (ValueError, RecursionError):
        raise BadRequestError("the body is not JSON") from None


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", headers={"Connection": "close"})


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _number(digits: str) -> int | float:
    is_integer = digits.lstrip("-").isdigit()
    if len(digits) > (24 if is_integer else 400):
        raise BadRequestError(f"a number of {len(digits)} digits is too long")
    return int(digits) if is_integer else float(digits)


def longest_token(tokenizer: Tokenizer) -> int:
    """An upper bound on the bytes of text that one token represents."""
    # Byte-level vocabularies write a byte as a character of up to two bytes.
    return max(len(text.encode()) for text in tokenizer.backend.get_vocab(with_added_tokens=True))


def read_request(
    service: Service, body: bytes, key: Key, loop: asyncio.AbstractEventLoop, *, chat: bool
) -> tuple[CompletionRequest, list[tuple[Job, Sequence[int]]]]:
    """Read a request into its jobs. This is slow, so it runs off the event loop."""
    request = schema.parse(parse_json(body), service.config, chat=chat)
    admitted = service.disclosure.admit(request.sampling, service.vocab_size)
    request = dataclasses.replace(request, sampling=admitted)
    return request, _make_jobs(service, request, key, loop)


def _make_jobs(
    service: Service, completion: CompletionRequest, key: Key, loop: asyncio.AbstractEventLoop
) -> list[tuple[Job, Sequence[int]]]:
    """A job for each copy of each prompt, and the prompt's tokens."""
    check_model(service.config, completion.model)
    fields = completion.sampling
    stop_ids = tuple({*fields.stop_token_ids, *(() if fields.ignore_eos else service.end_ids)})
    allowed = _allowed(service, fields, stop_ids)
    # A seed alone never determines a draw: the policy mixes it.
    same = {f.name: getattr(fields, f.name) for f in dataclasses.fields(Sampling)}
    jobs = []
    for number, prompt in enumerate(completion.prompts):
        tokens = prompt_tokens(service, completion, prompt)
        # The last new token is not read; without new tokens, the prompt's last one is.
        if len(tokens) + max(completion.max_tokens, 1) - 1 > service.config.max_length:
            got = f"{len(tokens)} prompt tokens and max_tokens={completion.max_tokens}"
            name = "messages" if completion.chat else "prompt"
            raise BadRequestError(f"{got} do not fit {service.config.max_length}", name)
        # Keys share no cache, so that timing does not reveal another key's prompts.
        salt, report = f"{key.name}\n{completion.cache_salt}", completion.prompt_shown is not None
        shared = Prompt(salt=salt, report=report)
        for copy in range(completion.n):
            seed = secrets.randbits(32) if fields.seed is None else fields.seed
            seed = (seed + number * completion.n + copy) % 2**32
            request = Request(
                prompt=tokens,
                max_new_tokens=completion.max_tokens,
                min_new_tokens=fields.min_tokens,
                sampling=Sampling(**same | {"seed": service.disclosure.seed(seed)}),
                stop_ids=stop_ids,
                logit_bias=dict(fields.logit_bias) or None,
                allowed=allowed,
                logprobs=completion.logprobs is not None,
                extra=service.disclosure.extra(tokens, fields, seed),
            )
            jobs.append((Job(request, shared, loop), tokens))
    return jobs


def _allowed(
    service: Service, fields: SamplingFields, stop_ids: Sequence[int]
) -> np.ndarray | None:
    """The words of `Request.allowed`; refuses unknown ids."""
    token_ids = {"logit_bias": dict(fields.logit_bias), "stop_token_ids": fields.stop_token_ids}
    for name, ids in (token_ids | {"allowed_token_ids": fields.allowed_token_ids or ()}).items():
        if wrong := [i for i in ids if i >= service.vocab_size]:
            raise BadRequestError(f"{name}: there is no token {wrong[0]}", name)
    if fields.allowed_token_ids is None:
        return None
    if fields.min_tokens and not set(fields.allowed_token_ids) - set(stop_ids):
        raise BadRequestError("min_tokens: each allowed token ends the answer", "min_tokens")
    bits = np.zeros(-(-service.vocab_size // 32) * 32, bool)
    bits[list(fields.allowed_token_ids)] = True
    return np.packbits(bits, bitorder="little").view("<u4")


def prompt_tokens(service: Service, request: CompletionRequest, prompt: Any) -> list[int]:
    name = "messages" if request.chat else "prompt"
    if request.chat:
        _check_size(service, sum(len(message["content"]) for message in prompt), name)
        try:
            prompt = service.tokenizer.render_chat(prompt, **request.template_variables)
        # Variables may have a name that is taken.
        except (ValueError, TypeError, RecursionError) as error:
            raise BadRequestError(str(error)[:200], name) from None
    if isinstance(prompt, str):
        _check_size(service, len(prompt), name)
        try:
            # Unlike `encode`, encoding a batch (of one) lets other threads run meanwhile.
            encoded = service.tokenizer.backend.encode_batch([prompt], add_special_tokens=False)
        except (TypeError, UnicodeError):  # Lone surrogates, which JSON can spell.
            raise BadRequestError(f"{name} is not valid Unicode", name) from None
        tokens = encoded[0].ids
        start = service.tokenizer.start if request.add_special_tokens else []
        if tokens[:1] != start:
            tokens = [*start, *tokens]
    else:
        tokens = list(prompt)
    if not tokens:
        raise BadRequestError(f"{name} has no token", name)
    if wrong := [i for i in tokens if i >= service.vocab_size]:
        raise BadRequestError(f"there is no token {wrong[0]}", name)
    return tokens


def _check_size(service: Service, characters: int, name: str) -> None:
    """Refuse a text that cannot fit before it is examined further."""
    if characters > service.most_characters:
        most = f"{service.config.max_length} tokens"
        raise BadRequestError(f"{characters} characters do not fit {most}", name)
