import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitjax.decoding import Sampling, _sampling
from logitjax.decoding._sampling import sampling_rows, truncate
from tests._compiled import compiled

sample, sampling_logits = compiled(_sampling.sample), compiled(_sampling.sampling_logits)

VOCAB = 40


def sorted_truncation(logits, top_k, top_p, min_p):
    """The textbook's sort, row by row; ties with the last kept entry are kept."""
    out = np.full_like(logits, -np.inf)
    for row, target in zip(logits, out, strict=True):
        order = np.argsort(-row, kind="stable")
        k = top_k or len(row)
        kept = row >= row[order[k - 1]]
        p = np.where(kept, np.exp(row - row.max()), 0)
        p /= p.sum()
        mass = np.cumsum(p[order])
        needed = min(np.searchsorted(mass, top_p - 1e-6), len(row) - 1)
        kept &= row >= row[order[needed]]
        kept &= np.exp(row - row.max()) >= min_p - 1e-9
        target[kept] = row[kept]
    return out


@jax.jit
def truncated(logits, top_k, top_p, min_p):
    return truncate(logits, top_k=top_k, top_p=top_p, min_p=min_p)


@given(
    seed=st.integers(0, 2**31),
    top_k=st.integers(0, VOCAB),
    top_p=st.sampled_from([0.05, 0.3, 0.777, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
    ties=st.booleans(),
)
def test_thresholds_equal_a_sort(seed, top_k, top_p, min_p, ties):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4, VOCAB)).astype(np.float32) * 3
    logits[:, rng.integers(VOCAB, size=3)] = -np.inf
    if ties:
        logits = np.round(logits)
    k, p, m = (np.full(4, v) for v in (np.int32(top_k), np.float32(top_p), np.float32(min_p)))
    out = np.asarray(truncated(logits, k, p, m))
    np.testing.assert_array_equal(out, sorted_truncation(logits, top_k, top_p, min_p))


def test_frequencies_follow_the_distribution():
    logits = np.float32([2.0, 1.0, 0.5, 0.0, -1.0, -np.inf])
    count = 20_000
    setting = Sampling(temperature=0.8, top_p=0.95)
    rows = sampling_rows([setting] * count)
    rows = type(rows)(**{**vars(rows), "seed": np.arange(count, dtype=np.uint32)})
    wide = np.broadcast_to(logits, (count, 6))
    drawn = np.asarray(sample(wide, rows, np.zeros(count, np.int32)))
    seen = np.bincount(drawn, minlength=6) / count
    expected = np.exp(np.asarray(sampling_logits(wide[:1], sampling_rows([setting]))[0]))
    expected /= expected.sum()
    assert (expected > 0).sum() == 4
    np.testing.assert_allclose(seen, expected, atol=4 * 0.5 / count**0.5)
    again = np.asarray(sample(wide, rows, np.ones(count, np.int32)))
    assert (again != drawn).any()


def test_cold_rows_take_the_most_likely_token():
    logits = np.float32([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]])
    rows = sampling_rows([Sampling(), Sampling(temperature=1e-6, seed=4)])
    np.testing.assert_array_equal(sample(logits, rows, np.array([0, 7], np.int32)), [1, 0])
    np.testing.assert_array_equal(
        np.isfinite(sampling_logits(logits, rows))[0], [False, True, False]
    )


def test_impossible_settings_are_named():
    for setting, message in (
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(min_p=2.0), "min_p"),
        (dict(repetition_penalty=0.0), "repetition_penalty"),
        (dict(seed=-1), "seed"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**setting)
