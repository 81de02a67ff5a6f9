"""Rows come back from a few values a query: exactly, at the stated price, or with a reason."""

import numpy as np
import pytest

from logitjax.leakage import LogitPolicy, estimate_output_subspace, recover_log_probs
from logitjax.leakage._recover_row import corner_matrix
from tests.leakage._models import head_and_states, log_softmax, oracle_of


def _logits(vocab, span=25.0, seed=0):
    values = np.random.default_rng(seed).standard_normal(vocab)
    return (values - values.min()) / np.ptp(values) * span


@pytest.mark.parametrize(("decimals", "error"), [(None, 5e-6), (7, 5e-6), (3, 1.6e-3)])
def test_top_five_and_bias_give_the_whole_row(decimals, error):
    logits = _logits(1001)
    policy = LogitPolicy(top_k=5, bias="reported", decimals=decimals)
    oracle = oracle_of(logits[None], policy)
    row = recover_log_probs(oracle, [0], 1001)
    assert row.coverage == 1.0
    assert row.method == "reference"
    worst = np.abs(row.log_probs - log_softmax(logits)).max()
    assert worst <= error
    assert worst <= max(row.error_bound, 5e-6)
    assert row.queries == oracle.queries == policy.row_queries(1001) == 251


def test_what_too_small_a_bias_leaves_below_is_reported_as_missing():
    logits = _logits(64, 12.0)
    oracle = oracle_of(logits[None], LogitPolicy(top_k=3, bias="reported"))
    row = recover_log_probs(oracle, [0], 64, bias=8.0)
    assert 0.1 < row.coverage < 1.0
    truth = log_softmax(logits)
    np.testing.assert_allclose(row.log_probs[row.known], truth[row.known], atol=2e-5)
    assert np.isnan(row.log_probs[~row.known]).all()
    assert row.queries == oracle.queries


def test_logits_rather_than_log_probabilities():
    logits = _logits(40, 9.0)
    policy = LogitPolicy(returns="logits", top_k=4, bias="reported")
    row = recover_log_probs(oracle_of(logits[None], policy), [0], 40)
    np.testing.assert_allclose(row.log_probs, log_softmax(logits), atol=1e-5)


def test_a_floor_hides_and_is_not_mistaken_for_a_value():
    logits = _logits(30, 20.0)
    policy = LogitPolicy(top_k=30, bias="reported", floor=-5.0)
    row = recover_log_probs(oracle_of(logits[None], policy), [0], 30, bias=1.0)
    truth = log_softmax(logits)
    hidden = truth < -8
    assert hidden.any()
    assert not row.known[hidden].any()


def test_one_value_a_query_is_searched_for():
    logits = _logits(20, 3.0)
    row = recover_log_probs(oracle_of(logits[None], LogitPolicy(top_k=1, bias="reported")), [0], 20)
    assert (row.method, row.coverage) == ("searched", 1.0)
    np.testing.assert_allclose(row.log_probs, log_softmax(logits), atol=row.error_bound)


def test_what_cannot_work_is_refused_with_the_reason():
    logits = _logits(20)[None]
    with pytest.raises(ValueError, match="move with a bias, got bias='sampling'"):
        recover_log_probs(oracle_of(logits, LogitPolicy(top_k=5, bias="sampling")), [0], 20)
    # A whole row holds no drawn token's value that a bias could force; nothing was found, unsaid.
    whole = LogitPolicy(returns="logits", sampled=True, bias="sampling")
    with pytest.raises(ValueError, match="a whole row"):
        recover_log_probs(oracle_of(logits, whole), [0], 20)
    policy = LogitPolicy(top_k=5, bias="reported", decimals=1)
    with pytest.raises(ValueError, match=r"decimals: expected answers .*, got 1 decimals"):
        recover_log_probs(oracle_of(logits, policy), [0], 20)
    policy = LogitPolicy(top_k=5, bias="reported", bias_limit=10)
    with pytest.raises(ValueError, match=r"bias: expected a number in \(0, 10"):
        recover_log_probs(oracle_of(logits, policy), [0], 20, bias=11)


def test_rows_from_a_basis_at_twice_as_many_tokens_as_dimensions():
    head, states = head_and_states(300, 12, 30)
    truth = log_softmax(states @ head.T)
    subspace = estimate_output_subspace(truth)
    tokens = subspace.choose_tokens(24)
    assert len(set(tokens.tolist())) == 24
    np.testing.assert_allclose(subspace.complete(tokens, truth[:, tokens]), truth, atol=1e-4)
    few = np.random.default_rng(1).choice(300, 13, replace=False)
    with pytest.raises(ValueError, match="tokens: expected at least 13, got 12"):
        subspace.complete(few[:12], truth[:, few[:12]])
    # Four tokens whose rows are nearly one tell the same thing four times.
    subspace.basis[few[:4]] = subspace.basis[few[0]] + 1e-9 * np.arange(4)[:, None]
    with pytest.raises(ValueError, match=r"tokens: expected a condition of at most 1e\+06, got"):
        subspace.complete(few, truth[:, few])
    with pytest.raises(ValueError, match="count: expected a number from 12 to 300, got 5"):
        subspace.choose_tokens(5)


def test_a_corner_has_the_rank_of_the_whole():
    head, states = head_and_states(400, 7, 11)
    oracle = oracle_of(states @ head.T, LogitPolicy(top_k=5, bias="reported"))
    columns = np.random.default_rng(2).choice(400, 11, replace=False)
    corner = corner_matrix(oracle, [[i] for i in range(11)], columns, 400)
    np.testing.assert_allclose(corner, log_softmax(states @ head.T)[:, columns], atol=1e-5)
    centred = corner - corner.mean(axis=1, keepdims=True)
    assert np.linalg.matrix_rank(centred, tol=1e-3) == 7
    assert oracle.queries <= 11 * (1 + 3)
    whole = oracle_of(states @ head.T, LogitPolicy())
    np.testing.assert_allclose(
        corner_matrix(whole, [[i] for i in range(11)], columns, 400), corner, atol=1e-5
    )
    assert whole.queries == 11


def test_logits_of_which_some_stay_unknown_are_given_below_the_largest():
    logits = np.where(np.arange(20) < 3, -np.inf, _logits(20, 3.0))
    policy = LogitPolicy(returns="logits", top_k=0, sampled=True, bias="sampling")
    row = recover_log_probs(oracle_of(logits[None], policy), [0], 20)
    assert row.method == "forced"
    expected = np.where(np.arange(20) < 3, np.nan, logits - logits.max())
    np.testing.assert_allclose(row.log_probs, expected, atol=1e-5)
