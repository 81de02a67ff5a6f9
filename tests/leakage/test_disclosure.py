"""Information of an answer about a row: likelihoods, bounds in nats, grids, and a ledger."""

import dataclasses

import numpy as np
import pytest

from logitjax.decoding._sampling import Sampling, sampling_logits, sampling_rows
from logitjax.leakage import Choice, Ledger, LogitPolicy

VOCAB = 1000
ROW = np.sort(np.random.default_rng(0).normal(0, 3.34, VOCAB))[::-1]


def gumbel(rng, *shape):
    return -np.log(-np.log(rng.random(shape)))


def test_the_law_is_that_of_decoding():
    rows = np.random.default_rng(1).normal(0, 3, (5, 40)).astype(np.float32)
    settings = [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8}]
    for temperature in (0.0, 0.7, 2.0):
        several = [Sampling(temperature=temperature, **one) for one in settings]
        drawn = np.asarray(sampling_logits(rows, sampling_rows(several)), np.float64)
        drawn -= np.log(np.exp(drawn).sum(-1, keepdims=True))
        for row, law, one in zip(rows, drawn, settings):
            ours = Choice(temperature=temperature, **one).law(row)
            np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(law))
            np.testing.assert_allclose(np.exp(ours), np.exp(law), atol=1e-6)


def test_what_moves_a_law_by_hand():
    neutral = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    neutral |= dict(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    assert Choice() == Choice(**neutral)
    choice = Choice(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    rows = np.array([[2.0, -1.0, 1.0, 0.5], [0.0, 3.0, -2.0, 1.0]])
    moved = dict(
        bias=np.array([0.0, 0.0, 1.0, 0.0]),
        seen=np.array([True, True, False, False]),
        counts=np.array([1, 0, 2, 0]),
    )
    by_hand = np.array([[0.25, -2.0, 1.0, 0.5], [-0.75, 1.5, -2.0, 1.0]])

    def law(u):
        return u - np.log(np.exp(u).sum(-1, keepdims=True))

    np.testing.assert_allclose(choice.law(rows, **moved), law(by_hand))
    np.testing.assert_array_equal(
        dataclasses.replace(choice, temperature=0.0).law(rows, **moved),
        [[-np.inf, -np.inf, 0, -np.inf], [-np.inf, 0, -np.inf, -np.inf]],
    )
    allowed = np.array([True, True, False, True])
    masked = np.where(allowed, by_hand, -np.inf)
    np.testing.assert_allclose(choice.law(rows, vocab_where=allowed, **moved), law(masked))
    # Tokens as likely as the last that is kept stay, and a mass that is met is enough.
    ties = np.log([[0.5, 0.25, 0.25, 0.0625], [0.25, 0.5, 0.0625, 0.25]])
    kept = np.isfinite(Choice(top_k=2).law(ties))
    np.testing.assert_array_equal(kept, [[True, True, True, False], [True, True, False, True]])
    kept = np.isfinite(Choice(top_p=0.5).law(np.log([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])))
    np.testing.assert_array_equal(kept, [[True, False, False], [False, False, True]])
    assert Choice(temperature=2.0).answers(0.2, 0.1) == pytest.approx((4 * 1.96 / 0.1) ** 2 * 4)


def test_a_hard_answer_leaves_the_rows_that_give_it():
    rng = np.random.default_rng(2)
    rows, noise = rng.normal(0, 2, (500, 6)), gumbel(rng, 6)
    moved = {"counts": np.array([0, 2, 0, 0, 1, 0]), "vocab_where": np.arange(6) != 3}
    choice = Choice(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.25)
    want = (rows - np.array([0, 1.25, 0, np.inf, 0.75, 0])).argmax(-1)
    for token in range(6):
        possible = choice.likelihood(rows, token, **moved) == 0
        np.testing.assert_array_equal(possible, want == token)
    # Known noise: a draw is a comparison too, and some row is possible for exactly one token.
    shared = [Choice(temperature=2.0).likelihood(rows, t, noise=noise) == 0 for t in range(6)]
    assert (np.sum(shared, axis=0) == 1).all()
    # B1: six answers cannot tell more than six sets of rows apart.
    shares = np.mean(shared, axis=1)
    assert -(shares[shares > 0] * np.log(shares[shares > 0])).sum() <= np.log(6)


def test_certificates_prove_what_a_kept_token_has():
    row = np.array([0.0, -1.0, -2.0, -4.0])
    for gap, kept in ((-2.1, True), (-1.9, False)):
        choice = Choice(temperature=2.0, min_p=np.exp(gap / 2.0))
        assert np.isfinite(choice.likelihood(row[None], 2)[0]) == kept
        assert choice.certificate == (round(gap, 6), 1.0, 0)
        assert choice.soft == 0
    assert Choice(temperature=2.0).certificate is None


def test_no_perturbation_is_told_faster_than_the_bound():
    rng = np.random.default_rng(3)
    for temperature, half in ((1.0, 0.1), (1.0, 0.5), (1.0, 2.0), (2.0, 2.0)):
        choice, largest = Choice(temperature=temperature), 0.0
        law = choice.law(ROW)
        for _ in range(100):
            # Shares of the likely tokens, which come nearest to the bound.
            up = rng.random(VOCAB) < rng.random()
            moved = choice.law(ROW + np.where(up, half, -half))
            largest = max(largest, float((np.exp(law) * (law - moved)).sum()))
        bound = choice.soft * half**2
        assert bound * 0.7 < largest <= bound
    penalised = Choice(repetition_penalty=0.5)
    assert penalised.soft == 4 * Choice().soft


def test_counts_are_as_far_off_as_their_law_says():
    choice, rng = Choice(temperature=2.0), np.random.default_rng(4)
    law = np.exp(choice.law(ROW))
    counts = rng.multinomial(20_000, law, 2000)[:, [5, 20]]
    seen = np.log(counts).std(0)
    np.testing.assert_allclose(seen, np.sqrt((1 - law) / (20_000 * law))[[5, 20]], rtol=0.08)
    # As many answers as are asked for make an interval of that width.
    width = 2 * 1.96 * 2.0 * seen[0]
    assert abs(choice.answers(law[5], width) / 20_000 - 1) < 0.16
    # The number of different tokens, at the figures of a row of that spread.
    distinct = (1 - (1 - law) ** 1000).sum()
    drawn = [np.unique(rng.choice(VOCAB, 1000, p=law)).size for _ in range(50)]
    assert abs(np.mean(drawn) - distinct) < 5


def test_grids_stay_coarse_together():
    thresholds = set()
    for temperature in np.linspace(0.05, 2, 57):
        for min_p in np.geomspace(0.01, 1, 57):
            choice = Choice(temperature=temperature, min_p=min_p, frequency_penalty=0.3).rounded()
            assert choice.rounded() == choice
            assert choice.frequency_penalty == 0
            thresholds.add(choice.certificate and choice.certificate[0])
    assert np.diff(sorted(thresholds)).min() > 0.49
    assert Choice(temperature=0.0, top_k=3, min_p=0.3).rounded() == Choice(temperature=0.0)
    assert Choice(top_k=70, top_p=0.97).rounded() == Choice(top_k=50, top_p=0.95)


def test_a_ledger_adds_over_everybody_and_charges_once():
    ledger = Ledger(limit=30.0)
    assert ledger.charge("c", ("anna", 1), 10.0)
    assert ledger.charge("c", ("anna", 1), 10.0)
    assert ledger.charge("c", ("ben", 1), 10.0)
    assert ledger.charge("other", ("ben", 1), 30.0)
    assert ledger["c"] == 20.0
    ledger.add("c", 5.0)
    assert not ledger.charge("c", ("eve", 9), 10.0)
    assert ledger.charge("c", ("eve", 9), 5.0)
    assert ledger["never asked"] == 0
    # A limit may be met.
    short = Ledger(limit=2.0)
    assert [short.charge("c", request, 1.0) for request in (1, 2, 3)] == [True, True, False]


def test_values_and_the_floor_of_noise_are_bounded():
    assert LogitPolicy(returns="token").value_nats(10) == 0
    five = LogitPolicy(top_k=5).value_nats(VOCAB)
    assert five == pytest.approx(5 * (np.log(VOCAB) + 32 * np.log(2)))
    assert LogitPolicy(top_k=0, sampled=True).value_nats(VOCAB) == pytest.approx(32 * np.log(2))
    floors = [LogitPolicy(noise=s).noise_nats(3.34) for s in (0.1, 0.3, 1.0)]
    np.testing.assert_allclose(floors, [3.51, 2.41, 1.25], atol=0.01)
    assert LogitPolicy().noise_nats(3.34) == np.inf
