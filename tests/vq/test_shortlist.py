import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.losses import Head
from logitjax.vq import Pages, ProductCodes, Shortlist
from logitjax.vq._loss import code_scores
from logitjax.vq._shortlist import rescored
from tests._compiled import compiled
from tests.vq.test_decode import log_normalizer, ranked

VOCAB, CODES, WIDTH, COUNT = 203, 16, 8, 24


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    assignment = rng.integers(0, CODES - 1, VOCAB).astype(np.int32)
    codebook = rng.normal(size=(CODES, WIDTH)).astype(np.float32)
    rows = codebook[assignment] + 0.3 * rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    return dict(
        hidden=rng.normal(size=(COUNT, WIDTH)).astype(np.float32),
        codebook=codebook,
        bias=rng.normal(size=VOCAB).astype(np.float32) * 0.1,
        assignment=assignment,
        rows=rows,
        labels=rng.integers(0, VOCAB, COUNT).astype(np.int32),
    )


@functools.partial(jax.jit, static_argnames=("num_pages", "temperature", "block_size"))
def nll_of(hidden, codebook, bias, assignment, labels, pages, rows, *, num_pages, **options):
    chosen = Shortlist(pages=pages, rescore=rows, num_pages=num_pages)
    return chosen.nll(hidden, codebook, bias, assignment, labels, **options)


@functools.partial(jax.jit, static_argnames=("k", "num_pages", "temperature"))
def top_of(hidden, codebook, k, pages, rows, *, num_pages, **options):
    chosen = Shortlist(pages=pages, rescore=rows, num_pages=num_pages)
    return chosen.top_k(hidden, codebook, k, **options)


@functools.partial(jax.jit, static_argnames=("num_pages",))
def logits_of(hidden, codebook, bias, assignment, pages, rows, *, num_pages):
    chosen = Shortlist(pages=pages, rescore=rows, num_pages=num_pages)
    return chosen.logits(hidden, codebook, bias, assignment)


def log_softmax(logits):
    return np.asarray(logits, np.float64) - log_normalizer(logits)[..., None]


def _head(case, num_pages, rescore=None):
    pages = Pages.cut(case["bias"], case["assignment"], size=4)
    rescore = case["rows"] if rescore is None else rescore
    return Shortlist(pages=pages, rescore=rescore, num_pages=num_pages)


def test_pages_hold_every_token_once(case):
    where = np.arange(VOCAB) % 5 > 0
    bias = np.where(where, case["bias"], -np.inf)
    pages = Pages.cut(bias, case["assignment"], size=4)
    tokens = np.asarray(pages.tokens)
    np.testing.assert_array_equal(np.sort(tokens[tokens >= 0]), np.flatnonzero(where))
    for code, row in zip(np.asarray(pages.code), tokens):
        assert (case["assignment"][row[row >= 0]] == code).all()
    mass = np.zeros(CODES)
    np.add.at(mass, np.asarray(pages.code), np.exp(np.asarray(pages.log_mass)))
    want = np.bincount(case["assignment"][where], np.exp(case["bias"][where]), CODES)
    np.testing.assert_allclose(mass, want, rtol=1e-5)


def test_loss_and_top_k_are_those_of_the_logits(case):
    head = _head(case, 10)
    coarse = (case["hidden"], case["codebook"], case["bias"], case["assignment"])
    arrays = (head.pages, case["rows"])
    logits = logits_of(*coarse, *arrays, num_pages=10)
    log_probs = log_softmax(logits)
    want = -np.take_along_axis(log_probs, case["labels"][:, None], -1)[:, 0]
    got = nll_of(*coarse, case["labels"], *arrays, num_pages=10, block_size=10)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    top = top_of(case["hidden"], case["codebook"], 9, *arrays, num_pages=10)
    values, tokens = ranked(logits, 9)
    np.testing.assert_array_equal(top.indices, tokens)
    np.testing.assert_allclose(top.values, values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(top.log_z, log_normalizer(logits), rtol=1e-5)


def test_a_shortlist_of_everything_is_the_full_head(case):
    pages = Pages.cut(case["bias"], case["assignment"], size=4)
    coarse = (case["hidden"], case["codebook"], case["bias"], case["assignment"])
    got = logits_of(*coarse, pages, case["rows"], num_pages=pages.tokens.shape[0])
    np.testing.assert_allclose(got, case["hidden"] @ case["rows"].T, rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_through_the_logits(case):
    head = _head(case, 6)
    hidden, assignment, labels = case["hidden"], case["assignment"], case["labels"]

    def lean(codebook, bias, rows):
        chosen = dataclasses.replace(head, rescore=rows)
        coarse = (hidden, codebook, bias, assignment)
        nll = chosen.nll(*coarse, labels, block_size=8)
        return nll.sum()

    def plain(codebook, bias, rows):
        chosen = dataclasses.replace(head, rescore=rows)
        logits = chosen.logits(hidden, codebook, bias, assignment)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1).sum()

    arguments = (case["codebook"], case["bias"], case["rows"])
    steps = [jax.grad(f, (0, 1, 2)) for f in (lean, plain)]
    got, want = jax.jit(lambda *x: [step(*x) for step in steps])(*arguments)
    for mine, reference in zip(got, want):
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-5)


def test_temperature_acts_on_all_logits(case):
    head = _head(case, 10)
    coarse = (case["hidden"], case["codebook"], case["bias"], case["assignment"])
    arrays = (head.pages, case["rows"])
    logits = np.asarray(logits_of(*coarse, *arrays, num_pages=10)) / 0.5
    options = dict(num_pages=10, temperature=0.5)
    top = top_of(case["hidden"], case["codebook"], 3, *arrays, **options)
    np.testing.assert_allclose(top.values, ranked(logits, 3)[0], rtol=1e-5)
    np.testing.assert_allclose(top.log_z, log_normalizer(logits), rtol=1e-5)
    nll = nll_of(*coarse, case["labels"], *arrays, **options)
    at_label = np.take_along_axis(logits, case["labels"][:, None], -1)[:, 0]
    want = np.asarray(top.log_z) - at_label
    np.testing.assert_allclose(nll, want, rtol=1e-4, atol=1e-5)


def test_a_shortlist_helps_and_a_longer_one_helps_more(case):
    full = case["hidden"] @ case["rows"].T
    probs = np.exp(log_softmax(full))
    coarse = (case["hidden"], case["codebook"], case["bias"], case["assignment"])

    def divergence(log_probs):
        return float((probs * (np.log(probs) - log_probs)).sum(-1).mean())

    seen = [
        divergence(log_softmax(logits_of(*coarse, _head(case, n).pages, case["rows"], num_pages=n)))
        for n in (1, 8, 32)
    ]
    assert seen == sorted(seen, reverse=True)


def test_product_rows_score_as_the_kernel_does(case):
    cov = np.cov(case["hidden"].T).astype(np.float32)
    fit = compiled(ProductCodes.fit)(
        case["rows"], np.ones(VOCAB, np.float32), cov, groups=4, num_codes=32
    )
    assert fit.codes.dtype == jnp.uint8
    want = case["hidden"] @ np.asarray(compiled(ProductCodes.kernel)(fit)).T
    np.testing.assert_allclose(
        compiled(ProductCodes.logits)(fit, case["hidden"]), want, rtol=1e-4, atol=1e-5
    )
    assert np.square(want - case["hidden"] @ case["rows"].T).mean() < 0.5


def test_spread_is_the_standard_deviation_of_the_error(case):
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(20_000, WIDTH)).astype(np.float32)
    wrong = hidden @ (case["rows"] - case["codebook"][case["assignment"]]).T
    got = compiled(Pages.spread)(
        case["rows"], case["codebook"], case["assignment"], np.cov(hidden.T)
    )
    np.testing.assert_allclose(got, wrong.std(0), rtol=1e-3)


def test_errors_name_the_argument(case):
    with pytest.raises(ValueError, match="num_pages: expected a number between 1 and"):
        _head(case, 10_000)
    with pytest.raises(ValueError, match="k: expected at most num_pages"):
        _head(case, 2).top_k(case["hidden"], case["codebook"], 9)
    with pytest.raises(ValueError, match=r"^groups: expected a divisor"):
        ProductCodes.fit(case["rows"], np.ones(VOCAB), np.eye(WIDTH), groups=3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_position_scores_as_one_of_many(dtype):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1000, WIDTH)).astype(dtype)
    hidden = rng.normal(size=(3, WIDTH)).astype(dtype)
    # More than are gathered at a time, and not a multiple of it.
    tokens = rng.integers(0, 1000, (3, 601))
    row_bias = rng.normal(size=1000).astype(np.float32)
    weights = rng.normal(size=(3, 601)).astype(np.float32)

    @jax.jit
    def scored(rows, hidden, tokens, weights):
        def total(rows, hidden):
            scores = rescored(Head(rows, row_bias), hidden, tokens)
            return (scores * weights).sum(), scores

        return jax.value_and_grad(total, (0, 1), has_aux=True)(rows, hidden)

    (_, together), together_grads = jax.device_get(scored(rows, hidden, tokens, weights))
    assert together.dtype == jnp.float32
    alone = [
        jax.device_get(scored(rows, *(x[i : i + 1] for x in (hidden, tokens, weights))))
        for i in range(3)
    ]
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == jnp.float32 else dict(rtol=0.02, atol=0.2)
    np.testing.assert_allclose(
        np.concatenate([scores for (_, scores), _ in alone]), together, **tolerance
    )
    summed = jax.tree.map(lambda *parts: sum(np.float32(x) for x in parts), *(g for _, g in alone))
    np.testing.assert_allclose(summed[0], np.float32(together_grads[0]), **tolerance)
    for i, (_, grads) in enumerate(alone):
        np.testing.assert_allclose(
            np.float32(grads[1][0]), np.float32(together_grads[1][i]), **tolerance
        )
    run = compiled(code_scores)
    scores = np.asarray(run(hidden, rows))
    np.testing.assert_allclose(run(hidden[:1], rows), scores[:1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(hidden[1], rows), scores[1], rtol=1e-5, atol=1e-5)
