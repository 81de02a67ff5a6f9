"""From a checked request to jobs: tokens, lengths, seeds."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from logitjax.decoding import Request, Sampling
from logitjax.serving._config import check_model
from logitjax.serving._errors import BadRequestError
from logitjax.serving._scheduler import Job
from logitjax.serving._schema import CompletionRequest
from logitjax.serving._service import Service


def make_jobs(service: Service, asked: CompletionRequest) -> list[tuple[Job, Sequence[int]]]:
    """A job for each copy of each prompt, and the prompt's tokens.

    Raises:
        ApiError: The request asks for what this model has not.
    """
    check_model(service.config, asked.model)
    wrong = [i for i in asked.logit_bias if i >= service.vocab_size]
    if wrong:
        raise BadRequestError(f"logit_bias: there is no token {wrong[0]}", "logit_bias")
    loop = asyncio.get_running_loop()
    jobs = []
    for number, prompt in enumerate(asked.prompts):
        tokens = _tokens(service, prompt, asked.chat)
        if len(tokens) + asked.max_tokens - 1 > service.config.max_length:
            raise BadRequestError(
                f"{len(tokens)} prompt tokens and max_tokens={asked.max_tokens} do not fit "
                f"{service.config.max_length}",
                "messages" if asked.chat else "prompt",
            )
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
            jobs.append((Job(request, loop), tokens))
    return jobs


def _tokens(service: Service, prompt: Any, chat: bool) -> list[int]:
    name = "messages" if chat else "prompt"
    if chat:
        try:
            prompt = service.tokenizer.render_chat(prompt, add_generation_prompt=True)
        except ValueError as error:
            raise BadRequestError(str(error), name) from None
    if isinstance(prompt, str):
        try:
            tokens = service.tokenizer.encode(prompt)
        except (TypeError, UnicodeError):  # Lone surrogates, which JSON can spell.
            raise BadRequestError(f"{name} is not valid Unicode", name) from None
    else:
        tokens = list(prompt)
    if not tokens:
        raise BadRequestError(f"{name} has no token", name)
    wrong = [i for i in tokens if i >= service.vocab_size]
    if wrong:
        raise BadRequestError(f"there is no token {wrong[0]}", name)
    return tokens
