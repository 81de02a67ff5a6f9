import jax
import numpy as np
import pytest
import scipy.stats

from logitjax.vq import VQTables, vq_logits
from tests._compiled import compiled

VOCAB, CODES, WIDTH, COUNT, K = 203, 16, 8, 24, 20

vq_tables, logits_of = compiled(VQTables.of), compiled(vq_logits)
top_of, sample_of = compiled(VQTables.top_k), compiled(VQTables.sample)


def ranked(logits, k):
    """Values and tokens of the `k` largest, the first of equal ones."""
    tokens = np.argsort(-np.asarray(logits), axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(np.asarray(logits), tokens, -1), tokens


def log_normalizer(logits):
    return np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))


def _case(seed=0):
    rng = np.random.default_rng(seed)
    return dict(
        hidden=rng.normal(size=(COUNT, WIDTH)).astype(np.float32),
        codebook=rng.normal(size=(CODES, WIDTH)).astype(np.float32),
        bias=rng.normal(size=VOCAB).astype(np.float32),
        assignment=rng.integers(0, CODES - 1, VOCAB).astype(np.int32),
    )


@pytest.mark.parametrize("ties", ["none", "rounded", "no bias"])
def test_top_k_is_that_of_the_scattered_logits(ties):
    case = _case()
    if ties != "none":
        case = {k: np.round(v) if k != "assignment" else v for k, v in case.items()}
    bias = None if ties == "no bias" else case["bias"]
    tables = vq_tables(bias, case["assignment"], CODES, width=K)
    got = top_of(tables, case["hidden"], case["codebook"], K)
    logits = logits_of(case["hidden"], case["codebook"], bias, case["assignment"])
    values, indices = ranked(logits, K)
    np.testing.assert_array_equal(got.indices, indices)
    np.testing.assert_array_equal(got.values, values)
    np.testing.assert_allclose(got.log_z, log_normalizer(logits), rtol=1e-5)


def test_top_k_at_a_temperature_over_some_tokens():
    case = _case()
    where = np.arange(VOCAB) % 3 > 0
    options = dict(temperature=0.5, vocab_where=where)
    tables = vq_tables(case["bias"], case["assignment"], CODES, width=K, **options)
    got = top_of(tables, case["hidden"], case["codebook"], 5)
    logits = logits_of(**case, **options)
    np.testing.assert_array_equal(got.indices, ranked(logits, 5)[1])
    np.testing.assert_allclose(got.log_z, log_normalizer(logits), rtol=1e-5)


def test_samples_follow_the_distribution():
    case = _case(3)
    where = np.arange(VOCAB) != 7
    tables = vq_tables(case["bias"], case["assignment"], CODES, temperature=1.5, vocab_where=where)
    draws = 100_000
    hidden = np.broadcast_to(case["hidden"][0], (draws, WIDTH))
    tokens = sample_of(tables, jax.random.key(1), hidden, case["codebook"])
    logits = logits_of(**case | {"hidden": case["hidden"][:1]}, temperature=1.5, vocab_where=where)
    probs = np.exp(np.asarray(logits[0], np.float64))
    seen = np.bincount(tokens, minlength=VOCAB)
    assert seen[7] == 0
    expected = draws * probs[where] / probs[where].sum()
    assert scipy.stats.chisquare(seen[where], expected).pvalue > 1e-3


def test_one_cluster_and_singletons():
    case = _case()
    for assignment, codes in ((0 * case["assignment"], 1), (np.arange(VOCAB), VOCAB)):
        codebook = np.resize(case["codebook"], (codes, WIDTH))
        tables = vq_tables(case["bias"], assignment.astype(np.int32), codes, width=4)
        got = top_of(tables, case["hidden"], codebook, 4)
        logits = logits_of(case["hidden"], codebook, case["bias"], assignment.astype(np.int32))
        np.testing.assert_array_equal(got.indices, ranked(logits, 4)[1])
        tokens = sample_of(tables, jax.random.key(0), case["hidden"], codebook)
        assert np.asarray(tokens).max() < VOCAB


def test_errors_name_the_argument():
    case = _case()
    tables = vq_tables(case["bias"], case["assignment"], CODES, width=4)
    with pytest.raises(ValueError, match=r"^k: expected 1 to the width of the tables, 4"):
        tables.top_k(case["hidden"], case["codebook"], 5)
    with pytest.raises(ValueError, match="width: expected a positive number"):
        VQTables.of(case["bias"], case["assignment"], CODES, width=0)
