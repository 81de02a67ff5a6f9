"""The completion server over loopback: what it answers, refuses, and survives."""

import concurrent.futures
import json
import os

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import openai
import pytest
import schemathesis
from flax import nnx

from logitjax import fusion, leakage, models
from logitjax.decoding import DecodeOptions, Ensemble, Sampling, generate
from logitjax.models import load_tokenizer
from tests.serving._server import post, server

KEY = "a-key"
COMPLETIONS = "/v1/completions"


def small_model(directory, vocab):
    """One layer and a wide vocabulary, on disk as any model is."""
    config = models.DecoderConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_length=512,
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0), layout="listed")
    models.save_pretrained(model, load_tokenizer("tiny"), directory)
    return model


@pytest.fixture(scope="module")
def address():
    arguments = ("--model=tiny", f"--api_key={KEY}", "--slots=4", "--max_length=96")
    flags = ("--max_tokens=32", "--max_waiting=40", "--top_logprobs=5", "--bias=reported")
    with server(*arguments, *flags) as (where, process):
        yield where
        assert process.poll() is None, "the server died"


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def model():
    return models.load("tiny", layout="listed")


def _greedy(model, prompt, count, **options):
    decoder, tokenizer = model
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return generate(
        decoder,
        [np.array(tokens)],
        max_new_tokens=count,
        sampling=Sampling(),
        stop_ids=(tokenizer.eos_id,),
        options=DecodeOptions(logprobs=True, top_logprobs=5),
        **options,
    )


@pytest.mark.every_change
@pytest.mark.slow
def test_greedy_completions_are_the_engine_s(client, model):
    answer = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=8, temperature=0, logprobs=5
    )
    want = _greedy(model, "Hello", 8)
    choice = answer.choices[0]
    assert choice.text == model[1].decode(np.asarray(want.tokens[0])[:8].tolist())
    np.testing.assert_allclose(
        choice.logprobs.token_logprobs, np.asarray(want.logprobs[0])[:8], atol=1e-4
    )
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 8
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.top_logprobs) == 8


@pytest.mark.every_change
@pytest.mark.slow
def test_streamed_text_is_the_whole_text(client):
    options = dict(model="tiny", prompt="abc", max_tokens=12, seed=3, temperature=0.9)
    # A server's draws are its own, and one in twenty such texts would end sooner.
    options |= dict(logit_bias={"256": -100})
    whole = client.completions.create(**options)
    parts = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(p.choices[0].text for p in parts if p.choices) == whole.choices[0].text
    assert [p for p in parts if p.choices][-1].choices[0].finish_reason == "length"
    assert parts[-1].usage.completion_tokens == 12


@pytest.mark.every_change
@pytest.mark.slow
def test_prompts_of_tokens_several_and_copies(client):
    answer = client.completions.create(
        model="tiny", prompt=[[1, 2, 3], [4, 5]], n=2, max_tokens=3, seed=0, temperature=1.0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 5
    _, twice = (
        client.completions.create(model="tiny", prompt="x" * 90, max_tokens=1) for _ in range(2)
    )
    assert twice.usage.prompt_tokens_details.cached_tokens > 45
    texts = [choice.text for choice in answer.choices]
    again = client.completions.create(
        model="tiny", prompt=[4, 5], max_tokens=3, seed=3, temperature=1.0
    )
    # The fourth answer draws with the fourth seed, alone or not.
    assert again.choices[0].text == texts[3]


@pytest.mark.every_change
@pytest.mark.slow
def test_logit_bias_forces_a_token_and_is_told_by_its_id(address):
    status, answer, _ = post(
        address,
        COMPLETIONS,
        {
            "prompt": [7],
            "max_tokens": 1,
            "temperature": 0,
            "logit_bias": {"65": 90},
            "logprobs": 2,
            "return_tokens_as_token_ids": True,
        },
        key=KEY,
    )
    assert status == 200
    shown = answer["choices"][0]["logprobs"]
    assert shown["tokens"] == ["token_id:65"]
    assert shown["token_logprobs"][0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.every_change
@pytest.mark.slow
def test_stop_strings_end_an_answer_and_stay_out_of_it(client):
    full = client.completions.create(model="tiny", prompt="Hi", max_tokens=20, temperature=0)
    text = full.choices[0].text
    stop = text[4:6]
    cut = client.completions.create(
        model="tiny", prompt="Hi", max_tokens=20, temperature=0, stop=[stop]
    )
    assert cut.choices[0].text == text[: text.find(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.every_change
@pytest.mark.slow
def test_an_echoed_prompt_is_told_as_an_answer_would_be(client, model):
    decoder, tokenizer = model
    options = dict(model="tiny", prompt="Hello", temperature=0, echo=True, logprobs=5)
    alone = client.completions.create(**options, max_tokens=0)
    choice, tokens = alone.choices[0], tokenizer.encode("Hello")
    assert (choice.text, choice.finish_reason) == ("Hello", "length")
    assert alone.usage.completion_tokens == 0
    hidden, _ = decoder.hidden_states(jnp.array([tokens]))
    truth = np.asarray(jax.nn.log_softmax(decoder.logits(hidden)[0, :-1]))
    assert choice.logprobs.top_logprobs[0] is None
    for row, logprob, top, token in zip(
        truth, choice.logprobs.token_logprobs[1:], choice.logprobs.top_logprobs[1:], tokens[1:]
    ):
        np.testing.assert_allclose(sorted(top.values()), np.sort(row)[-5:], atol=1e-4)
        # Beyond the five it is not told.
        if token in np.argsort(row)[-5:]:
            assert logprob == pytest.approx(row[token], abs=1e-4)
        else:
            assert logprob is None
    both = client.completions.create(**options, max_tokens=4)
    plain = client.completions.create(**options | {"echo": False}, max_tokens=4)
    assert both.choices[0].text == "Hello" + plain.choices[0].text
    told, rest = both.choices[0].logprobs, plain.choices[0].logprobs
    # A program of another length rounds the last digits otherwise.
    parts = choice.logprobs.token_logprobs + rest.token_logprobs
    assert [each is None for each in told.token_logprobs] == [each is None for each in parts]
    numbers = [[each for each in of if each is not None] for of in (told.token_logprobs, parts)]
    np.testing.assert_allclose(*numbers, atol=1e-4)
    assert told.text_offset == [*range(5), *(5 + start for start in rest.text_offset)]
    parts = list(client.completions.create(**options, max_tokens=4, stream=True))
    assert "".join(part.choices[0].text for part in parts) == both.choices[0].text


@pytest.mark.every_change
@pytest.mark.slow
def test_answers_of_a_schema_are_valid_beside_free_ones(client):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [True, None]}, "b": {"type": "string", "maxLength": 3}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    told = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    options = dict(model="tiny", prompt="abc", max_tokens=32, temperature=1.0)

    def ask(seed):
        structured = seed % 4 != 3
        answer = client.completions.create(
            **options, seed=seed, extra_body={"response_format": told} if structured else {}
        )
        if structured:
            assert answer.choices[0].finish_reason == "stop"
            jsonschema.validate(json.loads(answer.choices[0].text), schema)
        return structured

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(16))) == 12
    bad = {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}
    with pytest.raises(openai.BadRequestError, match="response_format: "):
        client.completions.create(**options, extra_body={"response_format": bad})


@pytest.mark.every_change
@pytest.mark.slow
def test_models_and_health(client, address):
    assert [m.id for m in client.models.list()] == ["tiny"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "field required"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": [300]}, "prompt", "there is no token 300"),
        ({"prompt": "a" * 90, "max_tokens": 20}, "prompt", "do not fit 96"),
        ({"prompt": "a" * 97, "max_tokens": 0, "echo": True}, "prompt", "do not fit 96"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "only with echo"),
        ({"prompt": "a", "max_tokens": 33}, "max_tokens", "equal to 32"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", "a valid integer"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "a valid number"),
        ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "a", "logprobs": 6}, "logprobs", "equal to 5"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "match pattern"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "equal to 100"),
        ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias", "no token 999"),
        ({"prompt": "a", "stop": ["a"] * 33}, "stop", "at most 32"),
        ({"prompt": "a", "stop_token_ids": [999]}, "stop_token_ids", "no token 999"),
        ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens", "larger than"),
        (
            {"prompt": "a", "min_tokens": 9, "allowed_token_ids": [256]},
            "min_tokens",
            "ends the answer",
        ),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not streamed"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "response_format": {"type": "json"}}, "response_format", "be 'text'"),
        (
            {"prompt": "a", "response_format": {"type": "json_schema"}},
            "response_format",
            "needs a json_schema",
        ),
        ({"prompt": "a", "structured_outputs": {"regex": "("}}, "structured_outputs", ": "),
        ({"prompt": "a", "n": 17}, "n", "equal to 16"),
        ({"prompt": "\ud800"}, "prompt", ""),
    ],
)
def test_bad_requests_name_the_field(address, body, param, message):
    status, answer, _ = post(address, COMPLETIONS, body, key=KEY)
    assert status == 400, answer
    assert answer["error"]["param"] == param
    assert message in answer["error"]["message"]


@pytest.mark.every_change
@pytest.mark.slow
def test_what_is_no_request_at_all(address):
    for raw in (b"", b"{", b"[1]", b"null", b'{"prompt": NaN}', b"[" * 100_000, os.urandom(64)):
        assert post(address, COMPLETIONS, None, key=KEY, raw=raw)[0] == 400
    assert post(address, COMPLETIONS, None, key=KEY, raw=b" " * 2_000_000)[0] == 413
    assert post(address, "/v1/nothing", {}, key=KEY)[0] == 404
    assert post(address, "/health", {}, key=KEY)[0] == 405
    assert post(address, COMPLETIONS, {"prompt": "a"})[0] == 401
    other = {"prompt": "a", "model": "gpt"}
    status, answer, _ = post(address, COMPLETIONS, other, key=KEY)
    assert (status, answer["error"]["message"]) == (404, "the model is 'tiny', not 'gpt'")
    # A byte-level model without a chat template cannot chat; it says so.
    status, answer, _ = post(
        address, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, key=KEY
    )
    assert status == 400
    assert "no chat template" in answer["error"]["message"]


@pytest.mark.slow
def test_overload_is_refused_with_a_time_and_nothing_else_breaks(address):
    def one(i):
        body = {"prompt": [i % 200 + 1] * 8, "max_tokens": 32, "n": 4, "seed": i}
        status, _, headers = post(address, COMPLETIONS, body, key=KEY)
        return status, headers.get("Retry-After")

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        responses = list(pool.map(one, range(80)))
    codes = {status for status, _ in responses}
    assert codes == {200, 429}
    assert all(int(after) >= 1 for status, after in responses if status == 429)
    assert post(address, COMPLETIONS, {"prompt": "a", "max_tokens": 1}, key=KEY)[0] == 200


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_slots(address, client):
    streams = [
        client.completions.create(model="tiny", prompt="a", max_tokens=32, n=8, stream=True)
        for _ in range(4)
    ]
    for stream in streams:
        next(iter(stream))
        stream.close()
    answer = client.completions.create(model="tiny", prompt="b", max_tokens=4)
    assert answer.usage.completion_tokens == 4


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_fuzzed_requests_never_break_it(address, path):
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    from hypothesis import HealthCheck, given, settings

    count = int(os.environ.get("LOGITJAX_FUZZ", "40"))
    seen = []

    @given(case=schema[path]["POST"].as_strategy())
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    def fuzz(case):
        answer = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        seen.append(answer.status_code)
        assert answer.status_code in (200, 400, 404, 413, 415, 429)
        if answer.status_code != 200:
            assert json.loads(answer.content)["error"]["message"]

    fuzz()
    # The toy has no chat template.
    assert (200 in seen) == ("chat" not in path)


@pytest.mark.every_change
@pytest.mark.slow
def test_a_row_comes_back_over_http(tmp_path):
    wide = small_model(tmp_path, 1000)
    hidden, _ = wide.hidden_states(jnp.array([[5, 6, 7]]))
    truth = np.asarray(jax.nn.log_softmax(wide.logits(hidden)[0, -1]))
    arguments = (f"--model={tmp_path}", "--bias=reported", "--decimals=7", "--max_length=64")
    with server(*arguments, "--slots=8", "--max_waiting=32") as (where, _):
        policy = leakage.LogitPolicy(top_k=5, bias="reported", decimals=7)
        oracle = leakage.HttpOracle(where, policy, budget=251)
        row = leakage.recover_log_probs(oracle, [5, 6, 7], 1000)
        assert row.coverage == 1.0
        assert np.abs(row.log_probs - truth).max() < 5e-6
        assert oracle.queries == policy.row_queries(1000) == 251
        with pytest.raises(ValueError, match="would exceed the budget"):
            oracle.ask([[1]])
        oracle.close()


@pytest.mark.slow
def test_an_unlearned_model_is_served_as_its_difference(model):
    decoder, tokenizer = model
    fused = Ensemble(
        decoder,
        experts=[models.load("tiny:1", layout="listed")[0]],
        fuse=fusion.LogitDifference(alpha=0.5),
    )
    want = _greedy((fused, tokenizer), "Hello", 6)
    arguments = ("--model=tiny", "--expert=tiny:1", "--fusion=logit_difference:alpha=0.5")
    with server(*arguments, "--slots=2", "--max_length=64") as (where, _):
        body = {"prompt": "Hello", "max_tokens": 6, "temperature": 0, "logprobs": 2}
        status, answer, _ = post(where, COMPLETIONS, body)
    assert status == 200
    choice = answer["choices"][0]
    seen, expected = choice["logprobs"]["token_logprobs"], np.asarray(want.logprobs[0])[:6]
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    plain = np.asarray(_greedy(model, "Hello", 6).logprobs[0])[:6]
    assert np.abs(expected - plain).max() > 1e-2


@pytest.mark.every_change
@pytest.mark.slow
def test_only_this_machine_is_audited():
    with pytest.raises(ValueError, match="expected one of this machine"):
        leakage.HttpOracle("http://example.com", leakage.LogitPolicy(top_k=5))


@pytest.mark.slow
def test_noise_is_the_prompt_s_and_decimals_are_kept():
    arguments = ("--model=tiny", "--noise=1", "--decimals=2", "--bias=none", "--max_length=64")
    with server(*arguments) as (where, _):
        ask = {"prompt": [40, 41], "max_tokens": 2, "temperature": 0, "logprobs": 3}
        first, again = (post(where, COMPLETIONS, ask)[1]["choices"][0] for _ in range(2))
        assert first["logprobs"] == again["logprobs"]
        for value in first["logprobs"]["token_logprobs"]:
            assert value == round(value, 2)
        exact = _greedy(models.load("tiny", layout="listed"), [40, 41], 3)
        quiet = np.asarray(exact.logprobs[0])[0]
        assert abs(first["logprobs"]["token_logprobs"][0] - quiet) > 0.01
        status, answer, _ = post(where, COMPLETIONS, ask | {"logit_bias": {"1": 2}})
        assert status == 400
        assert answer["error"]["message"] == "this server accepts no logit_bias"
