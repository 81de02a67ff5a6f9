"""Hidden dimension and column space under noise, rounding and a real spectrum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.leakage import LogitPolicy, align_head, estimate_output_subspace
from logitjax.leakage._alignment import utility_loss
from tests.leakage._models import head_and_states, log_softmax, oracle_of

VOCAB, WIDTH, COUNT = 1200, 24, 90


@pytest.fixture(scope="module")
def case():
    head, states = head_and_states(VOCAB, WIDTH, COUNT)
    return head, log_softmax(states @ head.T).astype(np.float32)


def test_the_head_s_span_is_found(case):
    head, rows = case
    subspace = estimate_output_subspace(rows)
    assert subspace.dimension == subspace.max_gap == WIDTH
    assert subspace.width.certain
    aligned = align_head(subspace.basis, head)
    assert aligned.relative_rms < 1e-4
    assert aligned.leak > 0.9999
    basis = np.asarray(subspace.basis)
    gram = basis.T @ basis
    np.testing.assert_allclose(gram, np.eye(WIDTH), atol=1e-4)


def test_log_probabilities_have_one_dimension_more_and_centring_takes_it(case):
    _, rows = case
    raw = estimate_output_subspace(rows, centre=False).width
    assert (raw.lower, raw.estimate) == (WIDTH, WIDTH + 1)
    assert "log-probabilities that were not centred" in raw.reason
    assert estimate_output_subspace(rows).dimension == WIDTH
    exactly = WIDTH + 1
    assert estimate_output_subspace(rows[:exactly]).dimension == WIDTH


def test_singular_values_are_numpy_s(case):
    _, rows = case
    centred = rows.astype(np.float64) - rows.mean(axis=1, keepdims=True, dtype=np.float64)
    want = np.linalg.svd(centred, compute_uv=False)[:WIDTH]
    subspace = estimate_output_subspace(rows)
    np.testing.assert_allclose(subspace.singular_values[:WIDTH], want, rtol=1e-5)


def test_rows_of_a_device_are_those_of_the_host(case, monkeypatch):
    _, rows = case
    host = estimate_output_subspace(rows)
    device = estimate_output_subspace(jnp.asarray(rows))
    np.testing.assert_array_equal(host.singular_values, device.singular_values)
    np.testing.assert_array_equal(host.basis, device.basis)
    monkeypatch.setattr("logitjax.leakage._gram.BLOCK", 500)
    blocks = estimate_output_subspace(rows).singular_values[:WIDTH]
    np.testing.assert_allclose(blocks, host.singular_values[:WIDTH], rtol=1e-9)


def test_half_precision_rows_are_read_as_they_are(case):
    _, rows = case
    half = jax.device_put(rows.astype(jnp.bfloat16))
    subspace = estimate_output_subspace(half, dimension=WIDTH)
    whole = jax.device_put(np.asarray(half, np.float32))
    want = estimate_output_subspace(whole, dimension=WIDTH)
    np.testing.assert_allclose(
        subspace.singular_values[:WIDTH], want.singular_values[:WIDTH], rtol=1e-9
    )
    np.testing.assert_allclose(subspace.basis, want.basis, atol=1e-5)


def test_metrics_know_chance(case):
    head, _ = case
    control = align_head(np.random.default_rng(3).standard_normal((len(head), WIDTH)), head)
    assert abs(control.leak) < 0.02
    assert control.chance == WIDTH / VOCAB
    assert control.overlap == pytest.approx(control.chance, abs=0.02)
    half = align_head((head - head.mean(axis=0))[:, : WIDTH // 2], head)
    assert half.overlap == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(ValueError, match="head: expected shape"):
        align_head(head[:5], head)


def test_utility_counts_what_honest_users_lose(case):
    _, rows = case
    oracle = oracle_of(rows, LogitPolicy(noise=2.0))
    served = oracle.ask([[i] for i in range(40)]).values
    loss = utility_loss(rows[:40], served)
    assert loss["kl"] > 0.5
    assert loss["top1"] < 0.8
    assert utility_loss(rows, rows)["top1"] == 1.0
    # Nor does padding of the vocabulary change a number.
    wide = [np.pad(x, ((0, 0), (0, 4)), constant_values=-np.inf) for x in (rows[:40], served)]
    assert utility_loss(*wide)["kl"] == pytest.approx(loss["kl"], rel=1e-4)
    # Values that do not sum to one are a distribution all the same.
    assert utility_loss(rows[:40], served + 3)["kl"] == pytest.approx(loss["kl"], rel=1e-4)


def test_arguments_are_checked(case):
    _, rows = case
    with pytest.raises(ValueError, match="dimension: expected one that 90 rows of 1200"):
        estimate_output_subspace(rows, dimension=91)


@pytest.mark.parametrize("condition", [1.0, 1e6, 1e13])
def test_alignment_is_that_of_householder_reflections(condition):
    rng = np.random.default_rng(3)
    scale = np.logspace(0, -np.log10(condition), 6)
    basis = rng.standard_normal((300, 6)) * scale @ np.linalg.qr(rng.standard_normal((6, 6)))[0]
    head = basis @ rng.standard_normal((6, 4)) + 0.1 * rng.standard_normal((300, 4))
    alignment = align_head(basis, head, centre=False)
    q, head_basis = np.linalg.qr(basis)[0], np.linalg.qr(head)[0]
    cosines = np.linalg.svd(q.T @ head_basis)[1]
    assert alignment.overlap == pytest.approx((cosines**2).mean(), abs=1e-9)
    left = np.linalg.norm(head - q @ (q.T @ head)) / np.linalg.norm(head)
    assert alignment.relative_rms == pytest.approx(left, abs=1e-9)
