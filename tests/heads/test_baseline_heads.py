import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.heads import (
    AdaptiveConfig,
    adaptive_cost,
    adaptive_log_probs,
    adaptive_nll,
    adaptive_topk,
    fit_adaptive_softmax,
    fit_low_rank,
    full_cost,
    init_adaptive_softmax,
    low_rank_logits,
    low_rank_nll,
)

VOCAB, WIDTH, COUNT = 60, 8, 30
CONFIG = AdaptiveConfig(vocab_size=VOCAB, hidden_size=WIDTH, cutoffs=(12, 30), div_value=2.0)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    unigram = rng.permutation(1.0 / np.arange(1, VOCAB + 1)).astype(np.float32)
    hidden = rng.normal(size=(COUNT, WIDTH)).astype(np.float32)
    labels = rng.integers(0, VOCAB, COUNT).astype(np.int32)
    rows = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    params = init_adaptive_softmax(jax.random.key(0), CONFIG, unigram)
    return dict(unigram=unigram, hidden=hidden, labels=labels, rows=rows, params=params)


def test_adaptive_loss_and_gradients_are_those_of_its_log_probabilities(case):
    tables = {name: case["params"][name] for name in ("order", "rank")}
    trained = {k: v for k, v in case["params"].items() if k not in tables}

    def lean(trained, hidden):
        return adaptive_nll(hidden, trained | tables, case["labels"], block_size=8).sum()

    def plain(trained, hidden):
        log_probs = adaptive_log_probs(hidden, trained | tables)
        return -jnp.take_along_axis(log_probs, case["labels"][:, None], -1).sum()

    got, grads = jax.jit(jax.value_and_grad(lean, (0, 1)))(trained, case["hidden"])
    want, want_grads = jax.jit(jax.value_and_grad(plain, (0, 1)))(trained, case["hidden"])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for mine, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-5)
    probs = np.exp(adaptive_log_probs(case["hidden"], case["params"]))
    np.testing.assert_allclose(probs.sum(-1), 1.0, rtol=1e-5)


def test_adaptive_top_k_is_exact_whether_or_not_a_tail_is_needed(case):
    for scale in (0.0, 3.0):
        hidden = case["hidden"] * scale
        top = jax.jit(adaptive_topk, static_argnums=2)(hidden, case["params"], 5)
        values, tokens = jax.lax.top_k(adaptive_log_probs(hidden, case["params"]), 5)
        np.testing.assert_allclose(top.values, values, rtol=1e-4, atol=1e-5)
        if scale:
            np.testing.assert_array_equal(top.indices, tokens)


def test_adaptive_from_a_full_head_of_full_width_ranks_the_frequent_as_it_does(case):
    config = AdaptiveConfig(vocab_size=VOCAB, hidden_size=WIDTH, cutoffs=(40,), div_value=1.0)
    params = fit_adaptive_softmax(
        config, case["rows"], case["unigram"], np.zeros(WIDTH), np.eye(WIDTH)
    )
    frequent = np.asarray(params["order"][:40])
    log_probs = adaptive_log_probs(case["hidden"], params)[:, frequent]
    full = (case["hidden"] @ case["rows"].T)[:, frequent]
    np.testing.assert_allclose(
        log_probs - log_probs[:, :1], full - full[:, :1], rtol=1e-3, atol=1e-3
    )


def test_low_rank_of_full_rank_is_the_full_head(case):
    mean, cov = case["hidden"].mean(0), np.cov(case["hidden"].T)
    down, kernel, bias = fit_low_rank(case["rows"], case["unigram"], mean, cov, WIDTH)
    full = case["hidden"] @ case["rows"].T
    np.testing.assert_allclose(
        low_rank_logits(case["hidden"], down, kernel, bias), full, rtol=1e-2, atol=1e-2
    )
    nll = low_rank_nll(case["hidden"], down, kernel, bias, case["labels"])
    want = (
        jax.nn.logsumexp(full, axis=-1) - np.take_along_axis(full, case["labels"][:, None], 1)[:, 0]
    )
    np.testing.assert_allclose(nll, want, rtol=1e-2, atol=1e-2)


def test_low_rank_keeps_what_hidden_states_use(case):
    hidden = case["hidden"] * np.array([3.0, 2.0] + [0.05] * (WIDTH - 2), np.float32)
    down, kernel, bias = fit_low_rank(
        case["rows"], case["unigram"], hidden.mean(0), np.cov(hidden.T), 2
    )
    wrong = low_rank_logits(hidden, down, kernel, bias) - hidden @ case["rows"].T
    assert np.abs(wrong).mean() < 0.15


def test_costs_of_the_same_head_agree():
    full = full_cost(VOCAB, WIDTH, bias=True)
    assert full.parameters == VOCAB * (WIDTH + 1)
    tied = full_cost(VOCAB, WIDTH, tied=True)
    assert (tied.parameters, tied.read_bytes) == (0, VOCAB * WIDTH * 4)
    adaptive = adaptive_cost(WIDTH, 12, [(18, 4, 0.5, 0.2), (30, 2, 0.1, 0.1)])
    params = init_adaptive_softmax(jax.random.key(0), CONFIG, np.ones(VOCAB))
    tables = {"order", "rank"}
    sizes = [v.size for k, v in params.items() if k not in {*tables, "tails"}]
    sizes += [leaf.size for leaf in jax.tree.leaves(params["tails"])]
    assert adaptive.parameters == sum(sizes)


def test_errors_name_the_argument(case):
    with pytest.raises(ValueError, match="cutoffs must rise"):
        AdaptiveConfig(vocab_size=10, hidden_size=4, cutoffs=(5, 5))
    with pytest.raises(ValueError, match="k must be between 1 and 12"):
        adaptive_topk(case["hidden"], case["params"], 13)
    with pytest.raises(ValueError, match="rank must be between 1 and"):
        fit_low_rank(case["rows"], case["unigram"], np.zeros(WIDTH), np.eye(WIDTH), 9)
