"""Limits of what a policy reveals, whatever is asked."""

import asyncio
import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.decoding import DecodeOptions, Engine, Ensemble, Request, Sampling
from logitjax.leakage import LogitPolicy
from logitjax.models import load_tokenizer
from logitjax.serving import Key, ServerConfig, build_app
from logitjax.serving import _schema as schema
from logitjax.serving._admission import _allowed, read_request
from logitjax.serving._errors import BadRequestError
from logitjax.serving._policy import Disclosure, _draw_keys
from logitjax.serving._service import Service
from tests.decoding._bags import bag_logits, bag_of_words
from tests.serving.inside import call, running

VOCAB, TOP = 257, 3


def test_allowed_tokens_are_bits_of_whole_words_and_others_are_refused():
    service, fields = mock.Mock(spec=Service), mock.Mock(spec=schema.SamplingFields)
    service.vocab_size, fields.min_tokens = 65, 0
    fields.logit_bias, fields.stop_token_ids, fields.allowed_token_ids = {}, (), (0, 64)
    words = _allowed(service, fields, ())
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [0, 64]
    fields.stop_token_ids = (65,)
    with pytest.raises(BadRequestError, match="stop_token_ids: there is no token 65"):
        _allowed(service, fields, ())


def test_a_context_has_one_name_whether_given_or_generated():
    noisy = Disclosure(LogitPolicy(top_k=TOP, noise=1.0), seed=4)
    remember = noisy.options(()).remember
    given = noisy.extra([5, 6, 70000])["context"]
    begun = {"context": noisy.extra([5])["context"][None]}
    for token in (6, 70000):
        begun = remember(begun, jnp.array([token]), jnp.array([True]))
        state = remember(begun, jnp.array([9]), jnp.array([False]))
    np.testing.assert_array_equal(begun["context"][0], given)
    np.testing.assert_array_equal(state["context"][0], given)
    others = [noisy.extra([6, 5, 70000]), Disclosure(noisy.policy, seed=5).extra([5, 6, 70000])]
    assert all((given != other["context"]).all() for other in others)


def test_seeds_of_requests_are_mixed_with_a_secret():
    one, two = (Disclosure(LogitPolicy(top_k=1), seed=seed) for seed in (1, None))
    assert one.seed(7) == Disclosure(LogitPolicy(top_k=1), seed=1).seed(7)
    assert len({one.seed(7), one.seed(8), two.seed(7), 7}) == 4


def test_noise_is_named_after_all_of_a_context_and_the_secret():
    contexts = np.array([[1, 5], [1, 6], [2, 5], [2, 6]], np.uint32)
    policy, rows = LogitPolicy(top_k=TOP, noise=1.0), set()
    for seed in (4, 5):
        served = jax.jit(Disclosure(policy, seed=seed).options(()).served)
        noisy = np.asarray(served(np.zeros((4, 8)), {"context": contexts}))
        rows |= {row.tobytes() for row in noisy}
    assert len(rows) == 8


def test_draws_are_keyed_by_both_words_of_their_name():
    words = np.array([[1, 5], [1, 6], [2, 5], [2, 6]], np.uint32)
    keys = jax.jit(lambda words: jax.random.key_data(_draw_keys({"draw": words})))(words)
    assert len({key.tobytes() for key in np.asarray(keys)}) == 4


def test_noise_is_keyed_by_both_words_of_its_secret(monkeypatch):
    context, rows = {"context": np.array([[1, 5]], np.uint32)}, set()
    for secret in ((7, 1), (7, 2), (8, 1)):
        words = np.array(secret, "<u4").tobytes()
        monkeypatch.setattr(Disclosure, "_digest", lambda *_, words=words: words)
        options = Disclosure(LogitPolicy(top_k=TOP, noise=1.0)).options(())
        rows.add(np.asarray(jax.jit(options.served)(np.zeros((1, 8)), context)).tobytes())
    assert len(rows) == 3


def test_values_end_at_the_floor_and_a_token_that_is_not_among_the_largest_keeps_its_own():
    policy = LogitPolicy(top_k=2, floor=-5.0, decimals=1)
    report = Disclosure(policy).report(np.array([-0.123, -7.0, -np.inf]))
    np.testing.assert_array_equal(report, [-0.1, -5.0, -5.0])
    # JSON has no infinity.
    assert Disclosure(LogitPolicy(top_k=2)).report(np.array([-np.inf])) == [-1e30]
    silent, open_ = (Disclosure(LogitPolicy(top_k=2, sampled=told)) for told in (False, True))
    assert [silent.tells(token, (3, 7)) for token in (3, 4)] == [True, False]
    assert [open_.tells(token, (3, 7)) for token in (3, 4)] == [True, True]


def test_a_prefix_is_shared_within_one_key_and_its_salt():
    """Who could learn from the time of an answer that another key has asked the same?"""
    service, loop = mock.Mock(spec=Service), mock.Mock(spec=asyncio.AbstractEventLoop)
    service.config, service.disclosure = PLAIN, Disclosure(PLAIN.policy)
    service.vocab_size, service.end_ids = VOCAB, ()

    def salt(name, **fields):
        body = json.dumps({"prompt": [5, 6]} | fields).encode()
        ((job, _),) = read_request(service, body, Key(name=name), loop, chat=False)[1]
        return job.prompt.salt

    assert salt("anna") == salt("anna")
    assert len({salt("anna"), salt("ben"), salt("anna", cache_salt="x")}) == 3


def test_policies_that_a_server_cannot_keep_are_named():
    for policy, message in (
        (LogitPolicy(), "top_k"),
        (LogitPolicy(returns="logits", top_k=1), "returns"),
        (LogitPolicy(top_k=1, noise=1.0, noise_per="query"), "noise_per"),
    ):
        with pytest.raises(ValueError, match=message):
            ServerConfig(model="m", policy=policy)
    told = {"policy": LogitPolicy(top_k=1), "model": "m", "choices": "plain"}
    for options, message in (
        ({"policy": LogitPolicy(top_k=1, bias="sampling")}, "bias: expected 'none' with choices"),
        ({"hidden_states": True}, "hidden_states: expected False with choices=plain"),
        ({"keys": (Key(nats=1.0),)}, "keys: expected no nats with choices=plain"),
        ({"choices": "open"}, "choices: expected one of free, plain, metered"),
    ):
        with pytest.raises(ValueError, match=message):
            ServerConfig(**(told | options))
    assert "reveal the logits" in ServerConfig(**(told | {"choices": "free"})).notice


PLAIN = ServerConfig(model="m", policy=LogitPolicy(returns="token"), choices="plain")


def admitted(**fields):
    asked = schema.parse({"prompt": [5]} | fields, PLAIN, chat=False)
    return Disclosure(PLAIN.policy, seed=1, choices="plain").admit(asked.sampling, VOCAB)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.73}, "temperature: the nearest accepted value is 0.7"),
        ({"min_p": 0.1}, "min_p: the nearest accepted value is 0.082085"),
        ({"min_p": 0.1, "temperature": 2.0}, "min_p: the nearest accepted value is 0.1054"),
        ({"top_p": 0.91}, "top_p: the nearest accepted value is 0.9"),
        ({"top_p": 0.9, "temperature": 0.7}, "temperature: the nearest accepted value is 1$"),
        ({"top_k": 40}, "top_k: the nearest accepted value is 50"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: the nearest accepted value is 0"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: the nearest accepted value is 1"),
        ({"response_format": {"type": "json_object"}}, "this server accepts no response_format"),
        ({"structured_outputs": {"regex": "a"}}, "this server accepts no structured_outputs"),
        ({"temperature": 0.0, "presence_penalty": 1.0}, "presence_penalty: the nearest"),
        ({"allowed_token_ids": [5, 6]}, "this server accepts no allowed_token_ids"),
        ({"min_tokens": 1}, "this server accepts no min_tokens"),
    ],
)
def test_plain_choices_name_the_nearest_that_is_taken(fields, message):
    with pytest.raises(BadRequestError, match=f"^{message}"):
        admitted(**fields)


def test_as_many_tokens_as_there_are_is_all_of_them():
    assert admitted(top_k=VOCAB) == admitted() == admitted(top_k=VOCAB + 9)


def test_schemas_where_they_are_taken_go_with_no_low_temperature():
    told = {"prompt": [5], "response_format": {"type": "json_object"}}
    open_ = Disclosure(PLAIN.policy, choices="plain", schemas=True)
    for temperature in (0.0, 1.0, 1.5):
        asked = schema.parse(told | {"temperature": temperature}, PLAIN, chat=False)
        assert open_.admit(asked.sampling, VOCAB).structure is not None
    asked = schema.parse(told | {"temperature": 0.5}, PLAIN, chat=False)
    with pytest.raises(BadRequestError, match=r"^temperature: the nearest accepted value is 1$"):
        open_.admit(asked.sampling, VOCAB)


def test_what_a_draw_is_named_after_is_the_request_and_all_tokens_so_far():
    plain = Disclosure(PLAIN.policy, seed=1, choices="plain")

    def name(tokens=(5, 6), seed=3, **fields):
        return plain.extra(tokens, admitted(**fields), seed)["draw"].tolist()

    same = [
        {"temperature": 1.0},
        {"n": 2, "max_tokens": 7, "stop": "x", "stream": True, "ignore_eos": True, "model": "m"},
        {"temperature": 1.0004, "presence_penalty": 0.0},
    ]
    assert all(name(**fields) == name() for fields in same)
    others = [{"seed": 4}, {"tokens": (6, 5)}, {"temperature": 0.9}, {"top_k": 5}, {"top_p": 0.9}]
    names = [name(), *(name(**fields) for fields in others)]
    assert len(set(map(tuple, names))) == len(names)
    # The likeliest token needs no noise: a seed makes no other request of it.
    assert name(temperature=0.0, seed=1) == name(temperature=0.0, seed=2, top_p=0.9)
    # No order: a bias as a client spells it.
    biases = (((1, 2.0), (7, 1.0)), ((7, 1.0), (1, 2.0), (9, 0.0)))
    biased = [dataclasses.replace(admitted(), logit_bias=bias) for bias in biases]
    first, second = (plain.extra([5], fields, 0)["draw"].tolist() for fields in biased)
    assert first == second != plain.extra([5], admitted(), 0)["draw"].tolist()


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.many_programs("an engine is started with what it compiles")
def test_same_request_same_answer_and_one_charge(tmp_path):
    path = tmp_path / "audit.jsonl"
    token = float(np.log(VOCAB))
    config = ServerConfig(
        model="bag",
        policy=LogitPolicy(returns="token"),
        choices="metered",
        context_nats=2.5 * token,
        slots=4,
        max_length=32,
        max_tokens=8,
        keys=(Key(name="anna", secret="s", nats=100.0), Key(name="ben", secret="t")),
        audit_log=str(path),
        policy_seed=3,
    )
    body = {"prompt": [11, 12], "max_tokens": 2, "temperature": 1.0, "seed": 7, "logprobs": 0}
    body["return_tokens_as_token_ids"] = True

    async def ask(*bodies):
        app = build_app(Ensemble(bag_of_words(4, VOCAB)), load_tokenizer("tiny"), (), config)
        async with running(app):
            called = [
                await call(app, "/v1/completions", body | more, key=key) for key, more in bodies
            ]
            return called, app.state.service.accounts

    answers, accounts = asyncio.run(
        ask(
            ("s", {}),
            ("t", {}),  # the same, of another key
            ("t", {"max_tokens": 1, "n": 2, "seed": 6}),  # its second copy is the first token
            ("t", {"seed": 9}),
        )
    )
    shown = [[c["logprobs"]["tokens"] for c in answer["choices"]] for _, answer in answers[:3]]
    assert shown[0] == shown[1]
    assert shown[2][1] == shown[0][0][:1]
    status, refused = answers[3]
    assert (status, refused["error"]["code"]) == (429, "insufficient_quota")
    assert "they are not renewed" in refused["error"]["message"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    told = [line.get("nats", 0.0) for line in lines]
    np.testing.assert_allclose(told, [2 * token, 0.0, token], atol=1e-6)
    assert accounts.spent(config.keys[0]).nats == pytest.approx(2 * token)
    # A given token is the same context as a written one, and draws the same after it.
    word = int(shown[0][0][0].removeprefix("token_id:"))
    more = {"prompt": [11, 12, word], "max_tokens": 1}
    answers, again = asyncio.run(ask(("s", more), ("s", {"seed": 100})))
    assert answers[0][1]["choices"][0]["logprobs"]["tokens"] == shown[0][0][1:]
    # What was told before a restart counts after it.
    assert answers[1][0] == 429
    assert again.spent(config.keys[0]).nats == pytest.approx(3 * token)


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
        drawn = {shown["tokens"][-1]: shown["token_logprobs"][-1]}
        untold += None in drawn.values()
        for name, value in (drawn | ((shown["top_logprobs"] or [{}])[-1] or {})).items():
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
