"""From the bytes of a request to jobs: fields, tokens, lengths, seeds."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from logitjax.decoding import Request, Sampling
from logitjax.models import Tokenizer
from logitjax.serving import _schema as schema
from logitjax.serving._body import parse_json
from logitjax.serving._config import check_model
from logitjax.serving._errors import BadRequestError
from logitjax.serving._keys import Key
from logitjax.serving._scheduler import Job, Prompt
from logitjax.serving._schema import CompletionRequest
from logitjax.serving._service import Service


def longest_token(tokenizer: Tokenizer) -> int:
    """Most bytes of text that one token stands for, or some more."""
    # Byte-level vocabularies spell a byte as a character of up to two.
    return max(len(text.encode()) for text in tokenizer.backend.get_vocab(with_added_tokens=True))


def read_request(
    service: Service, body: bytes, key: Key, loop: asyncio.AbstractEventLoop, *, chat: bool
) -> tuple[CompletionRequest, list[tuple[Job, Sequence[int]]]]:
    """What is asked, and its jobs. Takes its time: called off the event loop."""
    asked = schema.parse(parse_json(body), service.config, chat=chat)
    return asked, _make_jobs(service, asked, key, loop)


def _make_jobs(
    service: Service, asked: CompletionRequest, key: Key, loop: asyncio.AbstractEventLoop
) -> list[tuple[Job, Sequence[int]]]:
    """A job for each copy of each prompt, and the prompt's tokens."""
    check_model(service.config, asked.model)
    wrong = [i for i in asked.logit_bias if i >= service.vocab_size]
    if wrong:
        raise BadRequestError(f"logit_bias: there is no token {wrong[0]}", "logit_bias")
    follower = None if asked.json_schema is None else service.formats.follow(asked.json_schema)
    jobs = []
    for number, prompt in enumerate(asked.prompts):
        tokens = _tokens(service, prompt, asked.chat)
        # The last new token is not read; without any, the prompt's last one is.
        if len(tokens) + max(asked.max_tokens, 1) - 1 > service.config.max_length:
            raise BadRequestError(
                f"{len(tokens)} prompt tokens and max_tokens={asked.max_tokens} do not fit "
                f"{service.config.max_length}",
                "messages" if asked.chat else "prompt",
            )
        # One key does not learn from time what another one asked.
        shared = Prompt(salt=key.name, report=asked.echo and asked.logprobs is not None)
        for copy in range(asked.n):
            seed = secrets.randbits(32) if asked.seed is None else asked.seed
            seed = service.disclosure.seed((seed + number * asked.n + copy) % 2**32)
            sampling = Sampling(
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
                min_p=asked.min_p,
                repetition_penalty=asked.repetition_penalty,
                presence_penalty=asked.presence_penalty,
                frequency_penalty=asked.frequency_penalty,
                seed=seed,
            )
            request = Request(
                prompt=tokens,
                max_new_tokens=asked.max_tokens,
                sampling=sampling,
                stop_ids=service.end_ids,
                logit_bias=asked.logit_bias or None,
                extra=service.disclosure.extra(tokens),
            )
            copied = None if follower is None else follower.copy()
            jobs.append((Job(request, shared, loop, copied), tokens))
    return jobs


def _tokens(service: Service, prompt: Any, chat: bool) -> list[int]:
    name = "messages" if chat else "prompt"
    if chat:
        _check_size(service, sum(len(message["content"]) for message in prompt), name)
        try:
            prompt = service.tokenizer.render_chat(prompt, add_generation_prompt=True)
        except (ValueError, RecursionError) as error:
            raise BadRequestError(str(error)[:200], name) from None
    if isinstance(prompt, str):
        _check_size(service, len(prompt), name)
        try:
            # Unlike `encode` a batch, of one, lets other threads run meanwhile.
            encoded = service.tokenizer.backend.encode_batch([prompt], add_special_tokens=False)
        except (TypeError, UnicodeError):  # Lone surrogates, which JSON can spell.
            raise BadRequestError(f"{name} is not valid Unicode", name) from None
        tokens = encoded[0].ids
        start = [] if chat else service.tokenizer.start
        if tokens[:1] != start:
            tokens = [*start, *tokens]
    else:
        tokens = list(prompt)
    if not tokens:
        raise BadRequestError(f"{name} has no token", name)
    wrong = [i for i in tokens if i >= service.vocab_size]
    if wrong:
        raise BadRequestError(f"there is no token {wrong[0]}", name)
    return tokens


def _check_size(service: Service, characters: int, name: str) -> None:
    """Refuses what cannot fit before it is looked at any closer."""
    if characters > service.most_characters:
        raise BadRequestError(
            f"{characters} characters do not fit {service.config.max_length} tokens", name
        )
