"""Ready means compiled: no request that is accepted needs a program that is not there."""

import asyncio

import jax.monitoring
import pytest

from logitjax import models
from logitjax.decoding import Ensemble
from logitjax.leakage import LogitPolicy
from logitjax.serving import ServerConfig, build_app
from tests.serving.inside import call, running

COMPILED = "/jax/core/compile/backend_compile_duration"
LONG = list(range(1, 40))  # of several pieces, and with a beginning that others share
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"enum": [True, "ab"]}}}
MATRIX = [
    {"response_format": SCHEMA},
    {"logprobs": 2, "logit_bias": {"7": 5, "8": -5}},
    {"prompt": LONG, "echo": True, "logprobs": 1, "max_tokens": 0},
    {"prompt": LONG, "prompt_logprobs": 2},
    {"prompt": LONG, "temperature": 0},
    {"prompt": [LONG, [3], [4, 5], LONG[:20]], "n": 2, "seed": -1},
    {"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 2, "max_tokens": 9},
    {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "temperature": 2, "stop": ["a", "b", "c", "d", "e"]},
    {"min_tokens": 4, "stop_token_ids": [1, 2, 3], "ignore_eos": True},
    {"allowed_token_ids": [65, 66], "min_tokens": 3, "stream": True},
    {"structured_outputs": {"choice": ["yes", "no"]}, "n": 3},
    {"response_format": SCHEMA, "prompt": LONG, "prompt_logprobs": 0, "echo": True, "logprobs": 0},
]


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "choices"),
    [
        ({"bias": "sampling", "noise": 0.5}, "free"),
        ({"bias": "sampling", "decimals": 2, "sampled": True}, "free"),
        ({}, "metered"),
    ],
)
def test_after_ready_nothing_is_compiled(policy, choices):
    model, tokenizer = models.load("tiny", layout="listed")
    config = ServerConfig(
        model="tiny",
        policy=LogitPolicy(top_k=3, **policy),
        choices=choices,
        schemas=choices != "free",
        context_nats=1e6,
        slots=3,
        max_length=64,
        max_tokens=12,
        prefill_chunk=8,
        prefill_rows=2,
        prefix_cache_mb=1,
        hidden_states=choices == "free",
    )
    app = build_app(Ensemble(model), tokenizer, (256,), config)
    scheduler, compiled = app.state.service.scheduler, []

    def count(event, seconds, **about):
        if event == COMPILED:
            compiled.append(str(about))

    async def ask():
        async with running(app):
            while not scheduler.ready.is_set():
                assert scheduler.failed is None
                await asyncio.sleep(0.05)
            jax.monitoring.register_event_duration_secs_listener(count)
            try:
                answers = []
                for more in MATRIX:
                    body = {"prompt": "ab", "max_tokens": 6, "seed": 3} | more
                    answers.append((more, await call(app, "/v1/completions", body), len(compiled)))
                # Together, so that one waits for another's mask, and after somebody has left.
                several = [{"prompt": [i], "max_tokens": 12} | m for i, m in enumerate(MATRIX, 5)]
                leaving = asyncio.ensure_future(call(app, "/v1/completions", {"prompt": LONG}))
                await asyncio.sleep(0.01)
                leaving.cancel()
                asked = [call(app, "/v1/completions", body) for body in several]
                answers += zip(several, await asyncio.gather(*asked), strict=True)
                for sizes in ((2,), (40, 3, 64), (5,) * 9) if choices == "free" else ():
                    body = {"documents": [[1] * size for size in sizes], "starts": [1] * len(sizes)}
                    for given, method in ((None, "GET"), (body | {"rank": 2}, "POST")):
                        states = await call(app, "/v1/hidden_states", given, method=method)
                        answers.append((sizes, states, len(compiled)))
            finally:
                jax.monitoring.unregister_event_duration_listener(count)
            return answers

    answers = asyncio.run(ask())
    for body, (status, answer), *_ in answers:
        assert status == 200 or choices != "free", (body, answer)
    assert [status for _, (status, _), *_ in answers].count(200) >= len(answers) / 2
    assert not compiled, compiled
