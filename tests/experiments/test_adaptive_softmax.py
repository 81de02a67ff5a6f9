import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.vq_head.adaptive import AdaptiveConfig, adaptive_cost, adaptive_nll, adaptive_topk
from tests._compiled import compiled

VOCAB, WIDTH, COUNT = 60, 8, 30
CONFIG = AdaptiveConfig(vocab_size=VOCAB, hidden_size=WIDTH, cutoffs=(12, 30), div_value=2.0)


@compiled
def log_probs_of(hidden, params):
    """All log-probabilities, tails in full."""
    head = jax.nn.log_softmax(hidden @ params["head"].T + params["head_bias"])
    first = params["head"].shape[0] - len(params["tails"])
    parts = [head[..., :first]]
    for i, tail in enumerate(params["tails"]):
        logits = hidden @ tail["down"] @ tail["kernel"].T + tail["bias"]
        parts.append(head[..., first + i, None] + jax.nn.log_softmax(logits))
    return jnp.take(jnp.concatenate(parts, axis=-1), params["rank"], axis=-1)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    unigram = rng.permutation(1.0 / np.arange(1, VOCAB + 1)).astype(np.float32)
    hidden = rng.normal(size=(COUNT, WIDTH)).astype(np.float32)
    labels = rng.integers(0, VOCAB, COUNT).astype(np.int32)
    rows = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    params = jax.jit(lambda key: CONFIG.init(key, unigram))(jax.random.key(0))
    return dict(unigram=unigram, hidden=hidden, labels=labels, rows=rows, params=params)


def test_adaptive_loss_and_gradients_are_those_of_its_log_probabilities(case):
    tables = {name: case["params"][name] for name in ("order", "rank")}
    trained = {k: v for k, v in case["params"].items() if k not in tables}

    def lean(trained, hidden):
        return adaptive_nll(hidden, trained | tables, case["labels"], block_size=8).sum()

    def plain(trained, hidden):
        log_probs = log_probs_of(hidden, trained | tables)
        return -jnp.take_along_axis(log_probs, case["labels"][:, None], -1).sum()

    got, grads = jax.jit(jax.value_and_grad(lean, (0, 1)))(trained, case["hidden"])
    want, want_grads = jax.jit(jax.value_and_grad(plain, (0, 1)))(trained, case["hidden"])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for mine, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-5)
    probs = np.exp(log_probs_of(case["hidden"], case["params"]))
    np.testing.assert_allclose(probs.sum(-1), 1.0, rtol=1e-5)


def test_adaptive_top_k_is_exact_whether_or_not_a_tail_is_needed(case):
    for scale in (0.0, 3.0):
        hidden = case["hidden"] * np.float32(scale)
        top = compiled(adaptive_topk)(hidden, case["params"], 5)
        log_probs = np.asarray(log_probs_of(hidden, case["params"]))
        tokens = np.argsort(-log_probs, axis=-1, kind="stable")[:, :5]
        values = np.take_along_axis(log_probs, tokens, -1)
        np.testing.assert_allclose(top.values, values, rtol=1e-4, atol=1e-5)
        if scale:
            np.testing.assert_array_equal(top.indices, tokens)


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
