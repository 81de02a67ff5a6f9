import jax
import numpy as np
import pytest

from logitjax.vq import fit_assignment, perplexity_floor, vq_logits, vq_nll
from logitjax.vq._assignment import code_mass
from logitjax.vq._kmeans import fit_kmeans
from tests._compiled import compiled

VOCAB, WIDTH, CODES = 120, 6, 10


@pytest.fixture(scope="module")
def head():
    """A full head whose rows form clusters, with one direction that hidden states hardly use."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, CODES, VOCAB)
    centres = 2.0 * rng.normal(size=(CODES, WIDTH))
    rows = centres[truth] + 0.1 * rng.normal(size=(VOCAB, WIDTH))
    scale = np.ones(WIDTH)
    scale[0] = 1e-3
    rows[:, 0] += 50 * rng.normal(size=VOCAB)
    hidden = (rng.normal(size=(800, WIDTH)) + 0.3) * scale
    logits = hidden @ rows.T
    probs = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return dict(
        rows=rows.astype(np.float32),
        unigram=probs.mean(0).astype(np.float32),
        hidden=hidden.astype(np.float32),
        mean=hidden.mean(0).astype(np.float32),
        cov=np.cov(hidden.T).astype(np.float32),
        truth=truth,
        probs=probs,
    )


def _fit(head, method, **options):
    return compiled(fit_assignment)(
        head["rows"], head["unigram"], head["mean"], head["cov"], CODES, method=method, **options
    )


def _divergence(head, fit):
    logits = compiled(vq_logits)(head["hidden"], fit.codebook, fit.bias, fit.assignment)
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float((head["probs"] * (np.log(head["probs"]) - log_probs)).sum(-1).mean())


def test_the_metric_ignores_what_hidden_states_never_show(head):
    excess = {
        method: _divergence(head, _fit(head, method, key=jax.random.key(1)))
        for method in ("random", "kmeans", "weighted_kmeans")
    }
    assert excess["weighted_kmeans"] < 0.1
    for other in ("random", "kmeans"):
        assert excess["weighted_kmeans"] < 0.3 * excess[other], (other, excess)


def test_a_random_mapping_has_clusters_of_equal_size(head):
    sizes = np.bincount(_fit(head, "random").assignment, minlength=CODES)
    assert sizes.min() == sizes.max() == VOCAB // CODES


def test_kmeans_beats_its_start_and_blocks_do_not_matter():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(230, 5)).astype(np.float32)
    weights = rng.uniform(size=230).astype(np.float32)
    metric = np.cov(rng.normal(size=(5, 50))).astype(np.float32)
    runs = [
        fit_kmeans(
            points, weights, metric, 12, key=jax.random.key(0), iterations=8, block_size=size
        )
        for size in (230, 64)
    ]
    (assignment, centres), (again, _) = runs
    np.testing.assert_array_equal(assignment, again)
    # Each point's centre is near in the metric, and a centre is the mean of its points.
    apart = points[:, None] - np.asarray(centres)
    distances = np.einsum("nci,ij,ncj->nc", apart, metric, apart)
    assigned = np.take_along_axis(distances, np.asarray(assignment)[:, None], 1)[:, 0]
    assert assigned.mean() <= 1.05 * distances.min(1).mean()
    for number in range(12):
        of = np.asarray(assignment) == number
        mean = np.average(points[of], axis=0, weights=weights[of])
        np.testing.assert_allclose(centres[number], mean, rtol=1e-4, atol=1e-5)


def test_kmeans_leaves_no_centre_without_points():
    points = np.repeat(np.arange(6.0, dtype=np.float32), 40)[:, None]
    points = points + 1e-3 * np.random.default_rng(0).normal(size=points.shape)
    fitted = fit_kmeans(
        points.astype(np.float32), np.ones(240), None, 6, key=jax.random.key(3), iterations=12
    )
    assert len(np.unique(fitted[0])) == 6


def test_floor_of_known_mappings():
    unigram = np.arange(1.0, 13.0)
    injective = perplexity_floor(np.arange(12), unigram)
    assert (injective.perplexity, injective.excess_nats, injective.singleton_mass) == (
        1.0,
        0.0,
        pytest.approx(1.0),
    )
    one = perplexity_floor(np.zeros(12, int), unigram)
    prob = unigram / unigram.sum()
    assert one.perplexity == pytest.approx(12.0)
    assert one.excess_nats == pytest.approx((prob * np.log(prob * 12)).sum())
    assert (one.largest, one.codes_used) == (12, 1)
    pairs = perplexity_floor(np.arange(12) // 2, unigram)
    assert pairs.perplexity == pytest.approx(2.0)


def test_no_head_without_bias_goes_below_the_floor(head):
    fit = _fit(head, "weighted_kmeans")
    floor = perplexity_floor(fit.assignment, head["unigram"])
    labels = np.random.default_rng(0).choice(
        VOCAB, size=4000, p=head["unigram"] / head["unigram"].sum()
    )
    # A head that knows the cluster of every label: the best there can be.
    hidden = np.eye(CODES, dtype=np.float32)[np.asarray(fit.assignment)[labels]]
    nll = jax.jit(vq_nll)(
        hidden, 50 * np.eye(CODES, dtype=np.float32), None, fit.assignment, labels
    )
    assert np.exp(np.mean(nll)) == pytest.approx(floor.perplexity, rel=0.05)


def test_errors_name_the_argument(head):
    with pytest.raises(ValueError, match=r"^num_codes: expected 1 to"):
        fit_assignment(head["rows"], head["unigram"], head["mean"], head["cov"], 999)


def test_the_mass_of_codes_is_what_hidden_states_give_a_token_without_bias():
    rng = np.random.default_rng(2)
    codebook, hidden, bias = (rng.normal(size=size) for size in ((2, 3), (5, 3), 4))
    assignment = np.array([0, 1, 1, 0])
    z = hidden @ codebook.T
    total = np.exp(z[:, assignment] + bias).sum(-1)
    expected = np.log((np.exp(z) / total[:, None]).sum(0))
    rest = (bias.astype(np.float32), assignment, hidden.astype(np.float32))
    got = code_mass(codebook.astype(np.float32), *rest)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
