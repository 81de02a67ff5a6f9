import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.vq_head.adaptive import (
    AdaptiveConfig,
    adaptive_cost,
    adaptive_nll,
    adaptive_topk,
    log_probs,
)
from tests._compiled import compiled

VOCAB, WIDTH, COUNT = 60, 8, 30
CONFIG = AdaptiveConfig(vocab_size=VOCAB, hidden_size=WIDTH, cutoffs=(12, 30), div_value=2.0)


@compiled
def log_probs_of(hidden, params):
    """By token instead of by rank."""
    return jnp.take(log_probs(hidden, params), params["rank"], axis=-1)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    unigram = rng.permutation(1.0 / np.arange(1, VOCAB + 1)).astype(np.float32)
    hidden = rng.normal(size=(COUNT, WIDTH)).astype(np.float32)
    labels = rng.integers(0, VOCAB, COUNT).astype(np.int32)
    rows = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    params = jax.jit(lambda key: CONFIG.init(key, unigram))(jax.random.key(0))
    return dict(unigram=unigram, hidden=hidden, labels=labels, rows=rows, params=params)


def test_a_token_of_a_tail_is_as_probable_as_the_tail_times_its_share(case):
    params, hidden = case["params"], case["hidden"]

    def softmax(logits):
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    head = softmax(hidden @ params["head"].T + params["head_bias"])
    probs = [head[:, :12]]
    for entry, tail in zip((12, 13), params["tails"], strict=True):
        inside = softmax(hidden @ tail["down"] @ tail["kernel"].T + tail["bias"])
        probs.append(head[:, entry, None] * inside)
    probs = np.concatenate(probs, axis=-1)[:, params["rank"]]
    np.testing.assert_allclose(probs.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_probs_of(hidden, params)), probs, rtol=1e-4)
    nll = compiled(adaptive_nll)(hidden, params, case["labels"])
    labels = case["labels"][:, None]
    np.testing.assert_allclose(nll, -np.log(np.take_along_axis(probs, labels, 1))[:, 0], rtol=1e-4)
    tokens = compiled(adaptive_topk)(hidden, params, 5)
    np.testing.assert_array_equal(tokens, np.argsort(-probs, axis=-1)[:, :5])


def test_adaptive_from_a_full_head_of_full_width_ranks_the_frequent_as_it_does(case):
    config = AdaptiveConfig(vocab_size=VOCAB, hidden_size=WIDTH, cutoffs=(40,), div_value=1.0)
    fits = jax.jit(lambda rows: config.fit(rows, case["unigram"], np.zeros(WIDTH), np.eye(WIDTH)))
    params = fits(case["rows"])
    frequent = np.asarray(params["order"][:40])
    log_probs = np.asarray(log_probs_of(case["hidden"], params))[:, frequent]
    full = (case["hidden"] @ case["rows"].T)[:, frequent]
    np.testing.assert_allclose(
        log_probs - log_probs[:, :1], full - full[:, :1], rtol=1e-3, atol=1e-3
    )


def test_the_cost_counts_each_parameter_once(case):
    params = {name: case["params"][name] for name in ("head", "head_bias", "tails")}
    cost = adaptive_cost(params, case["params"])
    assert cost.parameters == sum(x.size for x in jax.tree.leaves(params))
