"""A policy does what it says, and the oracle counts."""

import jax
import numpy as np
import pytest

from logitjax.leakage import HttpOracle, LogitPolicy
from logitjax.leakage._oracle import BudgetExhaustedError
from logitjax.leakage._policy import Answer
from tests.leakage._models import log_softmax, oracle_of

LOGITS = np.array([[0.0, 3.0, 1.0, -2.0], [2.0, 0.5, 0.0, 1.0]])


def test_log_probs_rounded_and_cut():
    oracle = oracle_of(LOGITS, LogitPolicy(top_k=2, decimals=2))
    answer = oracle.ask([[0], [1]])
    want = np.sort(log_softmax(LOGITS), axis=1)[:, ::-1][:, :2].round(2)
    np.testing.assert_allclose(answer.values, want, atol=1e-6)
    np.testing.assert_array_equal(answer.tokens, [[1, 2], [0, 3]])
    assert (oracle.queries, oracle.values, oracle.prompts) == (2, 4, 2)


def test_floor_and_whole_rows():
    answer = oracle_of(LOGITS, LogitPolicy(floor=-2.0)).ask([[0]])
    np.testing.assert_allclose(answer.values, np.maximum(log_softmax(LOGITS[:1]), -2.0), atol=1e-6)
    np.testing.assert_array_equal(answer.tokens, [[0, 1, 2, 3]])


def test_bias_moves_what_is_reported_or_only_what_is_sampled():
    tokens, bias = np.array([[3, 0]]), np.array([[6.0, 1.0]])
    moved = LOGITS[0] + np.array([1.0, 0, 0, 6.0])
    answer = oracle_of(LOGITS, LogitPolicy(bias="reported", top_k=1)).ask_biased([0], tokens, bias)
    assert answer.tokens[0, 0] == 3
    np.testing.assert_allclose(answer.values[0, 0], log_softmax(moved)[3], atol=1e-6)
    answer = oracle_of(LOGITS, LogitPolicy(bias="sampling", top_k=1)).ask_biased([0], tokens, bias)
    assert answer.tokens[0, 0] == 1
    np.testing.assert_allclose(answer.values[0, 0], log_softmax(LOGITS[0])[1], atol=1e-6)
    policy = LogitPolicy(bias="sampling", top_k=1, sampled=True)
    answer = oracle_of(LOGITS, policy).ask_biased([0], tokens, bias)
    assert answer.tokens.tolist() == [[3, 1]]
    np.testing.assert_allclose(answer.values[0], log_softmax(LOGITS[0])[[3, 1]], atol=1e-6)
    only = LogitPolicy(returns="token", bias="sampling")
    answer = oracle_of(LOGITS, only).ask_biased([0], tokens, bias)
    assert answer.tokens.tolist() == [[3]]
    assert answer.values.shape == (1, 0)


def test_tokens_are_drawn_at_a_temperature_and_their_values_are_not():
    oracle = oracle_of(LOGITS, LogitPolicy.parse("draws"), batch_size=4000)
    assert oracle.ask([[0]] * 5).tokens.tolist() == [[1]] * 5
    for temperature in (1.0, 2.0):
        answer = oracle.ask([[0]] * 4000, temperature=temperature)
        shares = np.bincount(answer.tokens[:, 0], minlength=4) / 4000
        want = np.exp(log_softmax(LOGITS[0] / temperature))
        np.testing.assert_allclose(shares, want, atol=0.04)
        values = log_softmax(LOGITS[0])[answer.tokens[:, 0]]
        np.testing.assert_allclose(answer.values[:, 0], values, atol=1e-6)


def test_the_same_token_twice_is_lifted_by_the_sum_and_limits_hold():
    policy = LogitPolicy(returns="logits", bias="reported", bias_limit=4.0)
    answer = oracle_of(LOGITS, policy).ask_biased([0], [[0, 0]], [[9.0, 1.0]])
    assert answer.values[0, 0] == 5.0
    few = LogitPolicy(bias="reported", max_biased=1)
    with pytest.raises(ValueError, match="bias_tokens: expected at most 1 a query, got 2"):
        oracle_of(LOGITS, few).ask_biased([0], [[0, 1]], [[1.0, 1.0]])
    with pytest.raises(ValueError, match="takes no logit bias"):
        oracle_of(LOGITS, LogitPolicy()).ask_biased([0], [[0]], [[1.0]])


def test_noise_is_the_prompt_s_unless_it_is_asked_to_be_fresh():
    oracle = oracle_of(LOGITS, LogitPolicy(returns="logits", noise=1.0))
    first, again = oracle.ask([[0]]).values, oracle.ask([[0], [1]]).values
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.allclose(again[0] - LOGITS[0], again[1] - LOGITS[1])
    other = oracle_of(LOGITS, LogitPolicy(returns="logits", noise=1.0), seed=1)
    assert not np.allclose(first, other.ask([[0]]).values)
    fresh = oracle_of(LOGITS, LogitPolicy(returns="logits", noise=1.0, noise_per="query"))
    assert not np.allclose(fresh.ask([[0]]).values, fresh.ask([[0]]).values)
    many = oracle_of(np.zeros((1, 20_000)), LogitPolicy(returns="logits", noise=0.7))
    assert many.ask([[0]]).values.std() == pytest.approx(0.7, rel=0.02)


def test_noise_of_biased_queries_is_the_prompt_s_too():
    policy = LogitPolicy(returns="logits", noise=1.0, bias="reported")
    oracle = oracle_of(LOGITS, policy)
    plain = oracle.ask([[0]]).values[0]
    biased = oracle.ask_biased([0], [[1], [2]], [[5.0], [5.0]]).values
    np.testing.assert_allclose(biased - plain, [[0, 5, 0, 0], [0, 0, 5, 0]], atol=1e-6)


def test_a_budget_is_kept_and_nothing_is_answered_past_it():
    oracle = oracle_of(LOGITS, LogitPolicy(bias="reported"), budget=3)
    oracle.ask([[0], [1]])
    with pytest.raises(BudgetExhaustedError, match="2 queries would exceed the budget: 2 of 3"):
        oracle.ask_biased([0], [[0], [1]], [[1.0], [1.0]])
    assert oracle.queries == 2
    oracle.ask([[1]])
    assert oracle.queries == 3


def test_a_server_may_list_the_drawn_token_beside_the_top_ones(monkeypatch):
    policy = LogitPolicy(top_k=2, sampled=True, bias="sampling")
    oracle = HttpOracle("http://127.0.0.1:9", policy)

    def post(prompt, fields):
        drawn = "token_id:7" if fields.get("logit_bias") else "token_id:1"
        tops = {"token_id:1": -0.5, "token_id:2": -1.0} | (
            {drawn: -9.0} if drawn[-1] == "7" else {}
        )
        logprobs = {"tokens": [drawn], "token_logprobs": [tops[drawn]], "top_logprobs": [tops]}
        return {"choices": [{"logprobs": logprobs}]}

    monkeypatch.setattr(oracle, "_post", post)
    answer = oracle.ask_biased([1], [[7]], [[5.0]])
    plain = oracle.ask([[1]])
    np.testing.assert_array_equal(answer.tokens, [[7, 1, 2]])
    np.testing.assert_array_equal(plain.tokens, [[1, 1, 2]])


def test_a_budget_that_does_not_come_back_is_not_waited_for(monkeypatch):
    oracle, asked = HttpOracle("http://127.0.0.1:9", LogitPolicy(top_k=1)), []

    def send(body):
        asked.append(body)
        return 429, {}, b'{"error": {"code": "insufficient_quota"}}'

    monkeypatch.setattr(oracle, "_send", send)
    with pytest.raises(BudgetExhaustedError, match="insufficient_quota"):
        oracle.ask([[1]])
    assert len(asked) == 1


def test_prompts_of_several_lengths_and_a_forward_pass_each():
    calls = []

    def model(tokens):
        calls.append(tokens.shape)
        return LOGITS[np.asarray(tokens)[:, -1]].astype(np.float32)

    from logitjax.leakage import LogitOracle

    oracle = LogitOracle(model, LogitPolicy(returns="logits"), cache_size=2)
    answer = oracle.ask([[0], [5, 1], [0], [7, 0]])
    np.testing.assert_allclose(answer.values, LOGITS[[0, 1, 0, 0]], atol=1e-6)
    assert sorted(calls) == [(1, 1), (2, 2)]
    oracle.ask([[7, 0]])
    assert len(calls) == 2
    assert oracle.prompts == 3
    with pytest.raises(ValueError, match="apply_fn: expected"):
        LogitOracle(lambda tokens: np.zeros((1, 2, 3)), LogitPolicy()).ask([[1]])


def test_policies_name_their_mistakes():
    with pytest.raises(ValueError, match="bias: expected one of none, sampling, reported"):
        LogitPolicy(bias="yes")
    with pytest.raises(ValueError, match="top_k: expected a positive number"):
        LogitPolicy(top_k=0)
    with pytest.raises(ValueError, match="noise: expected at least 0"):
        LogitPolicy(noise=-1.0)


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.many_programs("called eagerly, each operation is one")
def test_report_is_pure():
    policy = LogitPolicy(bias="reported", top_k=2, decimals=3)
    served = np.asarray(LOGITS, np.float32)

    def run(logits, tokens, bias):
        answer = policy.report(logits, bias_tokens=tokens, bias_values=bias)
        return answer.values, answer.tokens

    arguments = served, np.array([[0], [1]]), np.array([[1.0], [2.0]], np.float32)
    eager, jitted = run(*arguments), jax.jit(run)(*arguments)
    one_by_one = jax.jit(jax.vmap(run))(*arguments)
    for a, b, c in zip(eager, jitted, one_by_one, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        np.testing.assert_allclose(a, c, atol=1e-6)
    assert isinstance(policy.report(served), Answer)
