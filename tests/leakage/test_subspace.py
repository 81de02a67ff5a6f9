"""Hidden dimension and column space under noise, rounding and a real spectrum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from logitjax.leakage import (
    LogitPolicy,
    _subspace,
    align_head,
    estimate_output_subspace,
)
from logitjax.leakage._alignment import utility_loss
from logitjax.leakage._gram import cholesky_qr, gram_matrix
from logitjax.leakage._sketch import init_sketch, randomised_svd, sketch_basis, update_sketch
from tests.leakage._models import head_and_states, log_softmax, oracle_of

VOCAB, WIDTH, COUNT = 1200, 24, 90


@pytest.fixture(scope="module")
def case():
    head, states = head_and_states(VOCAB, WIDTH, COUNT)
    return head, log_softmax(states @ head.T).astype(np.float32)


@pytest.mark.parametrize("method", ["gram", "sketch", "randomised"])
def test_every_method_finds_the_head_s_span(case, method):
    head, rows = case
    found = estimate_output_subspace(rows, method=method, max_rank=60)
    assert found.dimension == found.max_gap == WIDTH
    assert found.width.certain
    aligned = align_head(found.basis, head)
    assert aligned.relative_rms < 1e-4
    assert aligned.leak > 0.9999
    assert aligned.max_angle < 0.05
    basis = np.asarray(found.basis)
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
    found = estimate_output_subspace(rows)
    np.testing.assert_allclose(found.singular_values[:WIDTH], want, rtol=1e-5)


@pytest.mark.parametrize("centre", [True, False])
def test_blas_on_the_host_equals_xla(case, centre, monkeypatch):
    _, rows = case
    on_host = estimate_output_subspace(rows, centre=centre, block_size=500)
    held = estimate_output_subspace(jnp.asarray(rows), centre=centre)
    monkeypatch.setattr(_subspace, "on_host", lambda rows: False)
    by_xla = estimate_output_subspace(rows, centre=centre, block_size=500)
    assert on_host.dimension == held.dimension == by_xla.dimension == WIDTH + (not centre)
    size = on_host.dimension
    for other in (held, by_xla):
        np.testing.assert_allclose(
            on_host.singular_values[:size], other.singular_values[:size], rtol=1e-9
        )
        product = np.asarray(on_host.basis).T @ np.asarray(other.basis)
        both = np.linalg.svd(product, compute_uv=False)
        np.testing.assert_allclose(both, 1.0, atol=1e-5)


def test_half_precision_rows_are_read_as_they_are(case):
    _, rows = case
    half = jax.device_put(rows.astype(jnp.bfloat16))
    found = estimate_output_subspace(half, dimension=WIDTH)
    whole = jax.device_put(np.asarray(half, np.float32))
    want = estimate_output_subspace(whole, dimension=WIDTH)
    np.testing.assert_allclose(
        found.singular_values[:WIDTH], want.singular_values[:WIDTH], rtol=1e-9
    )
    np.testing.assert_allclose(found.basis, want.basis, atol=1e-5)


def test_sketch_streams_and_does_not_care_for_blocks(case):
    _, rows = case
    sketch = init_sketch(VOCAB, 40, jax.random.key(0))
    for start in range(0, COUNT, 32):
        sketch = update_sketch(sketch, rows[start : start + 32], centre=True)
    assert int(sketch.rows) == COUNT
    basis = np.asarray(sketch_basis(sketch))
    centred = rows - rows.mean(axis=1, keepdims=True)
    left = centred - centred @ basis @ basis.T
    assert np.linalg.norm(left) < 1e-3 * np.linalg.norm(centred)


def test_randomised_svd_needs_its_power_iteration_under_noise():
    head, states = head_and_states(VOCAB, 20, 300)
    rows = (states @ head.T).astype(np.float32)
    rows += 3.0 * np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32)
    full = np.linalg.svd(rows, full_matrices=False)[2][:20].T
    best = align_head(full, head, centre=False).max_angle
    angles = []
    for power in (0, 2):
        _, basis = randomised_svd(rows, 20, jax.random.key(0), power_iterations=power)
        angles.append(align_head(basis, head, centre=False).max_angle)
    assert angles[1] < angles[0] - 1
    assert angles[1] < best + 2


def test_vocabulary_sharded_equals_local(case):
    _, rows = case
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))

    def gram(rows):
        return gram_matrix(rows, centre=True, block_size=100, axis_name="tensor")

    def svd(rows):
        return randomised_svd(rows, WIDTH, jax.random.key(3), centre=True, axis_name="tensor")

    split = P(None, "tensor")
    over = jax.jit(jax.shard_map(gram, mesh=mesh, in_specs=split, out_specs=P()))
    np.testing.assert_allclose(over(rows), gram_matrix(rows, centre=True), rtol=1e-4, atol=0.05)
    run = jax.shard_map(
        svd, mesh=mesh, in_specs=split, out_specs=(P(), P("tensor")), check_vma=False
    )
    values, basis = jax.jit(run)(rows)
    alone, _ = randomised_svd(rows, WIDTH, jax.random.key(3), centre=True)
    np.testing.assert_allclose(values, alone, rtol=1e-4)
    basis = np.asarray(basis)
    np.testing.assert_allclose(basis.T @ basis, np.eye(WIDTH), atol=1e-4)


def test_cholesky_qr_survives_dependent_columns():
    columns = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    columns[:, 3] = columns[:, 0] + 1e-3 * columns[:, 1]
    basis = np.asarray(cholesky_qr(columns))
    assert np.isfinite(basis).all()
    inside = basis[:, :3] @ basis[:, :3].T @ columns[:, :3]
    np.testing.assert_allclose(inside, columns[:, :3], atol=1e-3)


def test_gram_of_many_rows_uses_the_symmetry():
    rows = np.random.default_rng(0).standard_normal((530, 70)).astype(np.float32)
    np.testing.assert_allclose(gram_matrix(rows, block_size=32), rows @ rows.T, atol=1e-3)


def test_metrics_know_chance(case):
    head, _ = case
    control = align_head(np.random.default_rng(3).standard_normal((len(head), WIDTH)), head)
    assert abs(control.leak) < 0.02
    assert control.chance == WIDTH / VOCAB
    assert control.overlap == pytest.approx(control.chance, abs=0.02)
    half = align_head((head - head.mean(axis=0))[:, : WIDTH // 2], head)
    assert half.overlap == pytest.approx(0.5, abs=1e-6)
    assert half.max_angle == pytest.approx(90)
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


def test_arguments_are_checked(case):
    _, rows = case
    with pytest.raises(ValueError, match="method: expected one of auto, gram"):
        estimate_output_subspace(rows, method="svd")
    with pytest.raises(ValueError, match="dimension: expected one that 90 rows of 1200"):
        estimate_output_subspace(rows, dimension=91)
    with pytest.raises(ValueError, match="rank: expected a number between 1 and 90"):
        randomised_svd(jnp.asarray(rows), 91, jax.random.key(0))


@pytest.mark.parametrize("condition", [1.0, 1e6, 1e13])
def test_alignment_is_that_of_householder_reflections(condition):
    rng = np.random.default_rng(3)
    scale = np.logspace(0, -np.log10(condition), 6)
    basis = rng.standard_normal((300, 6)) * scale @ np.linalg.qr(rng.standard_normal((6, 6)))[0]
    head = basis @ rng.standard_normal((6, 4)) + 0.1 * rng.standard_normal((300, 4))
    found = align_head(basis, head, centre=False)
    q, own = np.linalg.qr(basis)[0], np.linalg.qr(head)[0]
    cosines = np.linalg.svd(q.T @ own)[1]
    assert found.overlap == pytest.approx((cosines**2).mean(), abs=1e-9)
    left = np.linalg.norm(head - q @ (q.T @ head)) / np.linalg.norm(head)
    assert found.relative_rms == pytest.approx(left, abs=1e-9)


def test_the_caller_s_key_is_still_there_after_a_sketch(case):
    key = jax.random.key(3)
    first, again = (
        estimate_output_subspace(case[1], method="sketch", max_rank=60, key=key) for _ in range(2)
    )
    np.testing.assert_array_equal(first.singular_values, again.singular_values)
