"""Rows recovered from the drawn token alone, with its own value or without, and the cost."""

import numpy as np
import pytest

from logitjax.leakage import LogitPolicy, audit, estimate_output_subspace, recover_log_probs
from logitjax.leakage._policy import Answer
from logitjax.leakage._recover_row import harvested
from logitjax.leakage._search import Boxes, _one_of_n, search_logits
from tests.leakage._models import head_and_states, log_softmax, oracle_of

LOGITS = np.random.default_rng(0).standard_normal(60) * 4
HAND, SPAN = np.array([0.0, -2.0, -3.0, -5.5, -8.0]), 10.0


def test_the_drawn_token_s_own_value_gives_any_other_through_a_bias():
    for policy in (
        LogitPolicy.parse("sampling"),
        LogitPolicy(top_k=5, sampled=True, bias="sampling"),
    ):
        oracle = oracle_of(LOGITS[None], policy)
        row = recover_log_probs(oracle, [0], 60)
        assert row.method == "forced"
        assert row.coverage == 1.0
        assert row.queries == oracle.queries == 60
        assert np.abs(row.log_probs - log_softmax(LOGITS)).max() <= row.error_bound + 1e-6
    # Without the drawn token's value, or without a bias, nothing is forced.
    for policy, reason in (
        (LogitPolicy(top_k=5, bias="sampling"), "only the top k can be seen"),
        (LogitPolicy(top_k=5, sampled=True), "only what is drawn can be seen"),
        (LogitPolicy(returns="token"), "accepts a logit bias"),
    ):
        with pytest.raises(ValueError, match=reason):
            recover_log_probs(oracle_of(LOGITS[None], policy), [0], 60)


def test_what_a_bias_cannot_lift_is_no_number():
    logits = np.where(np.arange(60) < 3, -np.inf, LOGITS)
    for name in ("sampling", "top_5_bias"):
        row = recover_log_probs(oracle_of(logits[None], LogitPolicy.parse(name)), [0], 60)
        assert np.flatnonzero(~row.known).tolist() == [0, 1, 2]
        assert np.isnan(row.log_probs[:3]).all()
        assert np.isfinite(row.log_probs[3:]).all()


def test_draws_at_temperature_two_bring_rarer_tokens():
    oracle = oracle_of(LOGITS[None], LogitPolicy.parse("draws"), batch_size=400)
    truth, seen = log_softmax(LOGITS), []
    for temperature in (1.0, 2.0):
        row = harvested(oracle, [0], 60, 400, temperature)
        # Values are those of temperature 1, whatever the draw's was.
        np.testing.assert_allclose(row.log_probs[row.known], truth[row.known], atol=1e-5)
        assert np.isnan(row.log_probs[~row.known]).all()
        odds = np.exp(truth.astype(np.float64) / temperature)
        expected = (1 - (1 - odds / odds.sum()) ** 400).sum()
        assert row.known.sum() == pytest.approx(expected, abs=4)
        seen.append(row.known.sum())
    assert seen[1] > seen[0] + 5
    assert oracle.queries == 800


def test_a_harvest_completes_a_row_once_a_basis_is_known():
    head, states = head_and_states(200, 6, 30)
    subspace = estimate_output_subspace(log_softmax(states @ head.T).astype(np.float32))
    logits = states[:1] @ head.T
    oracle = oracle_of(logits, LogitPolicy.parse("draws"), batch_size=200)
    row = recover_log_probs(oracle, [0], 200, draws=200)
    tokens = np.flatnonzero(row.known)
    assert 12 <= len(tokens) < 150
    whole = subspace.complete(tokens, row.log_probs[None, tokens])
    np.testing.assert_allclose(whole[0], log_softmax(logits)[0], atol=1e-3)


def _answers(logits, span, winner=0):
    """Biases in nats, drawn tokens and bounds, answer by answer."""
    boxes, u = Boxes(len(logits), winner), 1 + (logits - logits.max()) / span
    while True:
        bias = _one_of_n(boxes.lower, boxes.upper)
        drawn = int(np.argmax(u + bias))
        assert boxes.learn(drawn, bias)
        yield bias * span, drawn, (boxes.lower - 1) * span, (boxes.upper - 1) * span


# By hand, for logits 0, -2, -3, -5.5, -8 and a span of 10: biases and drawn tokens of five queries,
# then the bounds; and the number of queries until all widths are below 0.1.
BIASES = [
    [0, 3.3126, 3.3126, 3.3126, 3.3126],
    [0, 1.0973, 3.3126, 3.3126, 3.3126],
    [0, 1.0973, 1.0973, 3.3126, 3.3126],
    [0, 1.8312, 1.8312, 5.5279, 5.5279],
    [0, 1.8312, 1.8312, 4.0464, 5.5279],
]
DRAWN, QUERIES = [1, 2, 0, 3, 0], 18
LOWER, UPPER = [0, -3.3126, -3.3126, -5.5279, -10], [0, -1.8312, -1.8312, -4.0464, -5.5279]


def test_a_search_asks_what_it_asks_by_hand():
    answers = _answers(HAND, SPAN)
    for bias, token in zip(BIASES, DRAWN, strict=True):
        asked, compared, low, high = next(answers)
        np.testing.assert_allclose(asked, bias, atol=1e-4)
        assert compared == token
    np.testing.assert_allclose(low, LOWER, atol=1e-4)
    np.testing.assert_allclose(high, UPPER, atol=1e-4)
    oracle = oracle_of(HAND[None], LogitPolicy.parse("argmax"))
    searched = search_logits(oracle, [0], np.arange(5), span=SPAN, tolerance=0.0999)
    # One more query says which token wins without a bias.
    assert searched.queries == oracle.queries == QUERIES + 1
    assert oracle.values == 0
    assert ((searched.lower <= HAND + 1e-6) & (searched.upper >= HAND - 1e-6)).all()


def test_a_tie_that_rounding_breaks_both_ways_is_no_contradiction():
    # .3 - .1 and .2 differ in their last digit, so a tie has the two tokens below each other.
    for slack, agrees in ((0.0, False), (1e-7, True)):
        boxes = Boxes(3, 0, slack)
        assert boxes.learn(1, np.array([0.0, 0.3, 0.1]))
        assert boxes.learn(2, np.array([0.0, 0.2, 0.0])) == agrees


@pytest.mark.parametrize("seed", range(2))
def test_what_an_api_rounds_is_neither_a_contradiction_nor_an_endless_search(seed):
    # As a model's: many tokens, a wide row, and sums with biases in float32.
    logits = (7 * np.random.default_rng(seed).standard_normal(256) - 12).astype(np.float32)
    oracle = oracle_of(logits[None], LogitPolicy.parse("argmax"))
    truth = logits - logits.max()
    for tolerance in (1e-2, 1e-6):
        searched = search_logits(oracle, [0], np.arange(256), tolerance=tolerance)
        assert searched.contradictions == 0
        near = np.isfinite(searched.lower)
        assert ((searched.lower <= truth) & (truth <= searched.upper))[near].all()
        assert (searched.upper - searched.lower)[near].max() <= max(1.01 * tolerance, 1e-3)


# Queries a token until the middles are off by 1e-2, 1e-3 and 1e-4 of the span, root mean square:
# papers/leakage, A4.1, for 100 tokens of standard deviation 5 and a span of 35.
def test_a_search_takes_as_many_queries_a_token_as_is_known():
    queries_by_seed = []
    for seed in range(6):
        logits = 5 * np.random.default_rng(seed).standard_normal(100)
        truth, marks = logits - logits.max(), []
        answers = _answers(logits, 35.0, int(logits.argmax()))
        for number, (_, _, low, high) in enumerate(answers, 1):
            assert (low <= truth + 1e-9).all()
            assert (truth <= high + 1e-9).all()
            error = np.sqrt(np.mean(((low + high) / 2 - truth) ** 2)) / 35
            marks += [number / 100] * int(error < 10.0 ** -(2 + len(marks)))
            if len(marks) == 3:
                break
        queries_by_seed.append(marks)
    assert (np.mean(queries_by_seed, axis=0) <= 1.1 * np.array([1.2, 2.1, 2.6])).all()


def test_bounds_of_differences_stay_closed():
    rng = np.random.default_rng(2)
    boxes, u = Boxes(9, 0), 1 - np.sort(rng.random(9) * 0.9)
    u[0] = 1.0
    edges = boxes.apart.copy()
    for _ in range(30):
        bias = np.concatenate([[0.0], rng.random(8)])
        drawn = int(np.argmax(u + bias))
        edges[drawn] = np.minimum(edges[drawn], bias[drawn] - bias)
        assert boxes.learn(drawn, bias)
    for k in range(9):  # Floyd and Warshall.
        edges = np.minimum(edges, edges[:, k : k + 1] + edges[k])
    np.testing.assert_allclose(boxes.apart, edges, atol=1e-12)


def test_searches_say_what_they_did_not_find():
    logits = np.array([[3.0, 0.0, -30.0, -50.0]])
    oracle = oracle_of(logits, LogitPolicy.parse("argmax"))
    searched = search_logits(oracle, [0], [0, 1, 2, 3], span=40.0)
    np.testing.assert_allclose(searched.middle[:3], [0.0, -3.0, -33.0], atol=0.01)
    assert np.isneginf(searched.lower[3])
    assert np.isnan(searched.middle[3])
    with pytest.raises(ValueError, match="accepts a logit bias"):
        search_logits(oracle_of(logits, LogitPolicy(returns="token")), [0], [1])
    with pytest.raises(ValueError, match="span: expected more than"):
        search_logits(oracle, [0], [1], span=101.0)


def test_answers_that_contradict_each_other_are_left_out():
    policy = LogitPolicy(returns="token", bias="sampling", noise=3.0, noise_per="query")
    oracle = oracle_of(HAND[None], policy, seed=0)
    # Noise now and then draws a token that nobody asked about.
    searched = search_logits(oracle, [0], [3, 4], span=SPAN)
    assert searched.contradictions > 0
    assert (searched.lower <= searched.upper).all()


@pytest.mark.parametrize("name", ["sampling", "top_5_bias"])
def test_an_audit_finds_the_width_behind_a_bias(name):
    head, states = head_and_states(120, 8, 20)
    logits = (states @ head.T).astype(np.float32)
    oracle = oracle_of(logits, LogitPolicy.parse(name))
    result = audit(oracle, [[i] for i in range(20)], 120, head=head, logits=logits, corner=20)
    assert result.width.certain
    assert result.width.estimate == 8
    # Measured at the corner's tokens, not said because a row came back.
    assert result.alignment.chance == 8 / 20
    assert result.leak > 0.999
    assert result.row_error < 1e-5
    per_row = 20 if name == "sampling" else 6
    assert result.queries <= 120 + 20 * per_row
    # Who asks once sees five values or one.
    assert result.utility["top1"] == 1.0
    assert result.utility["kl"] > 0.1
    assert oracle.queries == result.queries + 20


def test_whole_rows_that_come_largest_first_are_put_in_order(monkeypatch):
    """As servers report a top-k of all tokens."""
    head, states = head_and_states(120, 8, 20)
    oracle = oracle_of((states @ head.T).astype(np.float32), LogitPolicy(top_k=120))
    in_order = oracle.ask

    def largest_first(prompts):
        values = np.asarray(in_order(prompts).values)
        tokens = np.argsort(-values, axis=1)
        return Answer(values=np.take_along_axis(values, tokens, axis=1), tokens=tokens)

    monkeypatch.setattr(oracle, "ask", largest_first)
    result = audit(oracle, [[i] for i in range(20)], 120, head=head)
    assert result.width.certain
    assert result.width.estimate == 8
    assert result.leak > 0.999


def test_an_audit_of_tokens_alone_reports_what_comparisons_find():
    logits = LOGITS[None].astype(np.float32)
    oracle = oracle_of(logits, LogitPolicy.parse("argmax"))
    result = audit(oracle, [[0]], 60, logits=logits)
    assert result.row.method == "searched"
    assert result.row.coverage == 1.0
    assert result.row_error < 0.01
    assert result.leak is None
    assert result.utility == {"top1": 1.0}
    closed = audit(oracle_of(logits, LogitPolicy(returns="token")), [[0]], 60, logits=logits)
    assert closed.row is None
    assert closed.leak is None
    assert closed.queries == 0
    drawn = audit(oracle_of(logits, LogitPolicy.parse("draws")), [[0]], 60, logits=logits)
    assert drawn.row.method == "harvested"
    assert 0.5 < drawn.row.coverage <= 1.0


def test_of_a_row_behind_noise_no_error_is_promised_unless_the_model_is_known():
    logits = LOGITS[None].astype(np.float32)
    policy = LogitPolicy(top_k=5, bias="reported", noise=0.5)
    known = audit(oracle_of(logits, policy), [[0]], 60, logits=logits)
    assert 0.1 < known.row_error < 3
    unknown = audit(oracle_of(logits, policy), [[0]], 60)
    assert unknown.verdict.startswith("open: every row comes back to an unknown error")


def test_what_lies_below_the_span_is_not_looked_at_unless_it_is_asked_for():
    logits = np.float32([0.0, -2.5, -50.0])
    oracle = oracle_of(logits[None], LogitPolicy.parse("argmax"))
    searched = search_logits(oracle, [0], [1], span=8.0, tolerance=1.0)
    assert searched.lower[0] <= -2.5 <= searched.upper[0]
    assert searched.upper[0] - searched.lower[0] <= 1 + 2e-5
    assert np.isneginf(search_logits(oracle, [0], [2]).lower[0])
    assert np.isfinite(search_logits(oracle, [0], [2], span=80.0).lower[0])
