"""A server asks a head that screens for its best token, and for logits where clients want them."""

import asyncio
from typing import Any

import pytest

from logitjax import leakage, models
from logitjax.decoding import Ensemble
from logitjax.serving import ServerConfig, build_app
from tests.decoding.test_screened import ALL, BEST, Disagreeing
from tests.serving.inside import call, running


@pytest.mark.slow
@pytest.mark.many_programs("a server compiles all of its programs")
def test_greedy_answers_without_log_probabilities_are_the_fast_searchs():
    model, tokenizer = models.load("tiny", layout="listed")
    config = ServerConfig(model="tiny", policy=leakage.LogitPolicy(top_k=2), slots=2, max_length=32)
    app = build_app(Ensemble(model.with_head(Disagreeing())), tokenizer, (256,), config)

    async def answers(*requests: Any) -> Any:
        async with running(app):
            for _ in range(600):
                if (await call(app, "/ready", method="GET"))[0] == 200:
                    break
                await asyncio.sleep(0.1)
            body = dict(prompt="ab", max_tokens=4)
            return [await call(app, "/v1/completions", body | more) for more in requests]

    greedy, reported, warm = asyncio.run(
        answers(dict(temperature=0), dict(temperature=0, logprobs=1), dict(temperature=1))
    )
    first, other = (tokenizer.decode([token]) for token in (ALL, BEST))
    assert greedy[1]["choices"][0]["text"] == first + 3 * other
    for status, body in (reported, warm):
        assert (status, body["choices"][0]["text"]) == (200, 4 * first)
