"""In one process with the server: what prompts with a common beginning save."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.shared import suite
from logitjax import models
from logitjax.decoding import Ensemble
from logitjax.leakage import LogitPolicy
from logitjax.serving import ServerConfig, build_app
from tests.rigs._server_client import COMPLETIONS, small_decoder
from tests.serving.inside import call, running


async def _work(shared: int, tails: Sequence[Sequence[int]], prefix_mb: int) -> Any:
    config = ServerConfig(
        model="small",
        policy=LogitPolicy(returns="token"),
        max_length=shared + 64,
        max_tokens=16,
        prefix_cache_mb=prefix_mb,
    )
    app = build_app(Ensemble(small_decoder(1000)), models.load_tokenizer("tiny"), (), config)
    prefix = np.random.default_rng(0).integers(1, 1000, shared).tolist()

    async def one(tail: Sequence[int]) -> list[str]:
        body = {"prompt": [*prefix, *tail], "max_tokens": 16, "temperature": 0, "logprobs": 0}
        _, answer = await call(app, COMPLETIONS, body | {"return_tokens_as_token_ids": True})
        return answer["choices"][0]["logprobs"]["tokens"]

    async with running(app):
        answers = await asyncio.gather(*map(one, tails))
        reader = app.state.service.scheduler.reader
        return reader.tokens_read, reader.tokens_reused, answers


def prefixes(options: suite.Options) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    shared = 128 if options.smoke else 512
    tails = np.random.default_rng(1).integers(1, 1000, (32, 16)).tolist()
    without, _, plain = asyncio.run(_work(shared, tails, 0))
    read, reused, answers = asyncio.run(_work(shared, tails, 64))
    differing = sum(a != b for a, b in zip(plain, answers, strict=True))
    what = f"32 prompts, {shared} tokens in common and 16 of their own"
    row: dict[str, Any] = {"what": what}
    row |= {"tokens read without": without, "tokens read": read, "reused": reused}
    row["answers that differ"] = differing
    return [row], [
        suite.at_most("shared prefix: share of prompts read", read / without, 0.2),
        suite.at_most("shared prefix: answers that differ", differing, 0),
    ]
