"""What a policy lets out, whatever is asked."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.decoding import DecodeOptions, Engine, Ensemble, Request, Sampling
from logitjax.leakage import LogitPolicy
from logitjax.models import load_tokenizer
from logitjax.serving import ServerConfig, build_app
from logitjax.serving._policy import Disclosure
from tests.decoding._bags import bag_logits, bag_of_words
from tests.serving._inside import call, running

VOCAB, TOP = 257, 3


def test_a_context_has_one_name_whether_given_or_generated():
    noisy = Disclosure(LogitPolicy(top_k=TOP, noise=1.0), seed=4)
    remember = noisy.options(()).remember
    given = noisy.extra([5, 6, 70000])["context"]
    begun = {"context": noisy.extra([5])["context"][None]}
    for token in (6, 70000):
        begun = remember(begun, jnp.array([token]), jnp.array([True]))
        held = remember(begun, jnp.array([9]), jnp.array([False]))
    np.testing.assert_array_equal(begun["context"][0], given)
    np.testing.assert_array_equal(held["context"][0], given)
    others = [noisy.extra([6, 5, 70000]), Disclosure(noisy.policy, seed=5).extra([5, 6, 70000])]
    assert all((given != other["context"]).all() for other in others)


def test_seeds_of_requests_are_mixed_with_a_secret():
    one, two = (Disclosure(LogitPolicy(top_k=1), seed=seed) for seed in (1, None))
    assert one.seed(7) == Disclosure(LogitPolicy(top_k=1), seed=1).seed(7)
    assert len({one.seed(7), one.seed(8), two.seed(7), 7}) == 4


def test_policies_that_a_server_cannot_keep_are_named():
    for policy, message in (
        (LogitPolicy(), "top_k"),
        (LogitPolicy(returns="logits", top_k=1), "returns"),
        (LogitPolicy(top_k=1, noise=1.0, noise_per="query"), "noise_per"),
    ):
        with pytest.raises(ValueError, match=message):
            ServerConfig(model="m", policy=policy)


def test_what_a_request_moves_stays_out_of_what_is_reported():
    def capped(logits, extra):
        return jnp.minimum(logits, 1.0)

    bag, prompt = bag_of_words(2, 64), [5, 6, 7]
    request = Request(
        prompt=prompt,
        max_new_tokens=1,
        logit_bias={9: 50.0},
        sampling=Sampling(repetition_penalty=0.1),
    )
    served = np.minimum(bag_logits(bag[1], prompt), 1.0)
    biased = served + 50.0 * (np.arange(64) == 9)
    for of, want in (("model", served), ("biased", biased)):
        options = DecodeOptions(
            top_logprobs=3, logprobs_of=of, max_logit_bias=1, repetition=True, served=capped
        )
        first = Engine(bag, slots=2, max_length=32, options=options).prefill(0, request)
        truth = np.sort(np.asarray(jax.nn.log_softmax(want)))[::-1]
        np.testing.assert_allclose(np.asarray(first.top_logprobs)[0], truth[:3], atol=1e-4)
        assert np.asarray(first.tokens)[0] == 9


async def _attack(app, count):
    """Requests about one position, each with other biases, penalties, seeds and temperatures."""
    rng, values, untold = np.random.default_rng(0), {}, 0

    async def one(token):
        body = {
            "prompt": [11, 12, 13],
            "max_tokens": 1,
            "logprobs": int(rng.integers(0, TOP + 1)),
            "temperature": float(rng.choice([0.0, 1.0, 2.0])),
            "repetition_penalty": float(rng.choice([0.1, 1.0, 10.0])),
            "min_p": float(rng.random()),
            "seed": int(rng.integers(2**32)),
            "presence_penalty": float(rng.uniform(-2, 2)),
            "frequency_penalty": float(rng.uniform(-2, 2)),
            "logit_bias": {str(token): 100, "11": -100},
            "return_tokens_as_token_ids": True,
        }
        if rng.random() < 0.5:  # The same position as the last one of an echoed prompt.
            body |= {"prompt": [11, 12, 13, token], "echo": True, "max_tokens": 0}
        return await call(app, "/v1/completions", body)

    for status, answer in await asyncio.gather(*[one(i % VOCAB) for i in range(count)]):
        assert status == 200, answer
        shown = answer["choices"][0]["logprobs"]
        own = {shown["tokens"][-1]: shown["token_logprobs"][-1]}
        untold += None in own.values()
        for name, value in (own | ((shown["top_logprobs"] or [{}])[-1] or {})).items():
            if value is not None:
                values.setdefault(name, set()).add(round(value, 4))
    return values, untold


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_all_requests_about_a_position_see_k_values(noise):
    policy = LogitPolicy(top_k=TOP, bias="sampling", noise=noise)
    config = ServerConfig(
        model="bag", policy=policy, slots=8, max_length=32, max_waiting=1000, max_tokens=4
    )
    app = build_app(Ensemble(bag_of_words(8, VOCAB)), load_tokenizer("tiny"), (), config)

    async def attack():
        async with running(app):
            return await _attack(app, 300)

    values, untold = asyncio.run(attack())
    # Every token was forced once; only the first k have a value, and each one value.
    assert untold > 250
    assert len(values) == TOP
    assert [len(seen) for seen in values.values()] == [1] * TOP
