import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax.losses import Head
from logitjax.models import Decoder, DecoderConfig
from logitjax.ops import Codes
from logitjax.vq import ProductHead, ScreenedHead, VQHead
from logitjax.vq._loss import code_scores
from logitjax.vq._screened import fitted_tail, rescored, row_errors
from tests._compiled import compiled
from tests._marks import EVERY_CHANGE
from tests._modules import with_weights

VOCAB, WIDTH, COUNT = 96, 8, 20


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(VOCAB, WIDTH)) * np.array([2.0, 1.5] + [0.4] * (WIDTH - 2))
    rows = rows.astype(np.float32)
    hidden = rng.normal(size=(COUNT, WIDTH)).astype(np.float32)
    down = np.linalg.svd(rows, full_matrices=False)[2][:2].T
    low = down, rows @ down
    labels = rng.integers(0, VOCAB, COUNT).astype(np.int32)
    screen = functools.partial(low_rank_logits, down=low[0], kernel=low[1])
    full = hidden @ rows.T
    return dict(rows=rows, hidden=hidden, low=low, labels=labels, full=full, screen=screen)


def low_rank_logits(hidden, down, kernel):
    return hidden @ down @ kernel.T


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


low_rank_logits_of = compiled(low_rank_logits)


def screened_logits(screen, hidden):
    return jax.jit(lambda hidden: screen(hidden))(hidden)


def screened_nll(screen, hidden, labels):
    return jax.jit(screen.nll)(hidden, labels)


def screened_topk(screen, hidden, k, **options):
    return jax.jit(functools.partial(screen.top_k, k=k, **options))(hidden)


def _screen(case, count):
    return ScreenedHead(case["screen"], rows=case["rows"], num_candidates=count)


def test_the_best_of_the_screen_are_exact_and_the_rest_is_the_screen_s(case):
    cheap = np.asarray(low_rank_logits_of(case["hidden"], *case["low"]))
    logits = np.asarray(screened_logits(_screen(case, 12), case["hidden"]))
    best = np.argsort(-cheap, axis=-1)[:, :12]
    exact = np.take_along_axis(case["full"], best, 1)
    mass = np.exp(np.take_along_axis(cheap, best, 1)).sum(-1)
    want = cheap + np.log(np.exp(exact).sum(-1) / mass)[:, None]
    np.put_along_axis(want, best, exact, 1)
    # What all candidates get together is the screen's.
    share = np.take_along_axis(np.exp(log_softmax(logits)), best, 1).sum(-1)
    np.testing.assert_allclose(share, mass / np.exp(cheap).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)
    everything = screened_logits(_screen(case, VOCAB), case["hidden"])
    np.testing.assert_allclose(everything, case["full"], rtol=1e-4, atol=1e-5)


def test_a_tail_keeps_the_screen_s_scores_of_all_others(case):
    cheap = np.asarray(low_rank_logits_of(case["hidden"], *case["low"]))
    head = ScreenedHead(case["screen"], rows=case["rows"], num_candidates=12, tail=0.5)
    logits = np.asarray(screened_logits(head, case["hidden"]))
    others = np.argsort(-cheap, axis=-1)[:, 12:]
    seen = np.take_along_axis(logits, others, 1)
    want = np.take_along_axis(cheap, others, 1) + 0.5
    np.testing.assert_allclose(seen, want, rtol=1e-4, atol=1e-6)


def test_a_fitted_tail_has_the_full_head_s_mass(case):
    head = _screen(case, 12)
    head.tail = fitted_tail(head, Head(case["rows"], vocab_axis=0), case["hidden"])
    probs = np.exp(log_softmax(screened_logits(head, case["hidden"])))
    cheap = np.asarray(low_rank_logits_of(case["hidden"], *case["low"]))
    others = np.argsort(-cheap, axis=-1)[:, 12:]
    want = np.exp(log_softmax(case["full"]))
    seen, want = (np.take_along_axis(p, others, 1).sum(-1).mean() for p in (probs, want))
    assert seen == pytest.approx(want, rel=1e-4)


def test_a_number_that_the_context_adds_to_the_screen_changes_nothing(case):
    screen = _screen(case, 12)
    moved = ScreenedHead(
        lambda hidden: case["screen"](hidden) + 3.0 * hidden[:, :1] - 5.0,
        rows=case["rows"],
        num_candidates=12,
    )
    want = screened_nll(screen, case["hidden"], case["labels"])
    np.testing.assert_allclose(
        screened_nll(moved, case["hidden"], case["labels"]), want, rtol=1e-4, atol=1e-5
    )
    top = screened_topk(moved, case["hidden"], 3)
    np.testing.assert_allclose(top.log_z, screened_topk(screen, case["hidden"], 3).log_z, 1e-5)


def test_loss_and_gradients_are_those_of_the_logits(case):
    down, kernel = case["low"]

    def screened(kernel, rows):
        screen = functools.partial(low_rank_logits, down=down, kernel=kernel)
        return ScreenedHead(screen, rows=rows, num_candidates=12)

    def lean(kernel, rows):
        extra = dict(block_size=6, temperature=0.8, z_loss=1e-3)
        return screened(kernel, rows).nll(case["hidden"], case["labels"], **extra).sum()

    def plain(kernel, rows):
        logits = screened(kernel, rows)(case["hidden"]) / 0.8
        log_z = jax.nn.logsumexp(logits, axis=-1)
        at_label = jnp.take_along_axis(logits, case["labels"][:, None], -1)[:, 0]
        return (log_z - at_label + 1e-3 * log_z**2).sum()

    arguments = (kernel, case["rows"])
    steps = [jax.value_and_grad(f, (0, 1)) for f in (lean, plain)]
    got, want = jax.jit(lambda *x: [step(*x) for step in steps])(*arguments)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def test_top_k_is_the_full_head_s_wherever_the_screen_lists_it(case):
    top = screened_topk(_screen(case, 30), case["hidden"], 3)
    cheap = np.asarray(low_rank_logits_of(case["hidden"], *case["low"]))
    listed = np.argsort(-cheap, axis=-1)[:, :30]
    tokens = np.argsort(-case["full"], axis=-1, kind="stable")[:, :3]
    values = np.take_along_axis(case["full"], tokens, -1)
    caught = (tokens[:, :, None] == listed[:, None, :]).any(-1).all(-1)
    assert caught.mean() > 0.5
    np.testing.assert_array_equal(np.asarray(top.indices)[caught], tokens[caught])
    np.testing.assert_allclose(np.asarray(top.values)[caught], values[caught], rtol=1e-4)
    logits = np.asarray(screened_logits(_screen(case, 30), case["hidden"]))
    np.testing.assert_allclose(top.log_z, np.log(np.exp(logits).sum(-1)), rtol=1e-5)
    greedy = screened_topk(_screen(case, 30), case["hidden"], 3, with_log_z=False)
    np.testing.assert_array_equal(greedy.indices, top.indices)
    assert not np.asarray(greedy.log_z).any()


@pytest.mark.parametrize("kind", ["product", pytest.param("VQ", marks=EVERY_CHANGE)])
def test_any_cheap_head_screens_for_a_tied_decoder(case, kind):
    make = {
        "product": lambda rngs: ProductHead(WIDTH, VOCAB, groups=4, num_codes=8, rngs=rngs),
        "VQ": lambda rngs: VQHead(WIDTH, VOCAB, 16, rngs=rngs),
    }[kind]
    screen = nnx.jit(lambda: make(nnx.Rngs(0)))()
    config = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
    )
    head = ScreenedHead(screen, num_candidates=VOCAB)
    model = with_weights(lambda: Decoder(config, rngs=nnx.Rngs(1), layout="listed"))
    model.head = head
    embedding = np.asarray(model.embedding[...])

    @jax.jit
    def look(hidden, labels):
        top = model.head.top_k(hidden, 1, embedding)
        return model.logits(hidden), top, model.head.nll(hidden, labels, embedding)

    logits, top, nll = jax.device_get(look(case["hidden"], case["labels"]))
    full = case["hidden"] @ embedding.T
    np.testing.assert_allclose(logits, full, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(top.indices[:, 0], full.argmax(-1))
    want = -np.take_along_axis(log_softmax(full), case["labels"][:, None], 1)[:, 0]
    np.testing.assert_allclose(nll, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="head: expected one with a kernel"):
        model.head_of()


def test_costs_add_up():
    screen = with_weights(lambda: VQHead(64, 1000, 8, rngs=nnx.Rngs(0)))
    rows, alone = np.zeros((1000, 64), np.float32), screen.cost()
    cost = ScreenedHead(screen, num_candidates=20).cost(rows)
    assert cost.parameters == alone.parameters
    assert cost.read_bytes - alone.read_bytes == 20 * 64 * 4
    untied = ScreenedHead(screen, num_candidates=20, rows=rows).cost()
    assert untied.stored_bytes - cost.stored_bytes == rows.size * 4


def test_errors_name_the_argument(case):
    with pytest.raises(
        ValueError, match="num_candidates: expected a number between 1 and the vocabulary, 96"
    ):
        screened_logits(_screen(case, VOCAB + 1), case["hidden"])
    with pytest.raises(ValueError, match="k: expected a number between 1 and num_candidates=4"):
        screened_topk(_screen(case, 4), case["hidden"], 5)
    with pytest.raises(ValueError, match="labels: expected shape"):
        screened_nll(_screen(case, 4), case["hidden"], case["labels"][:-1])
    screen = with_weights(lambda: VQHead(WIDTH, VOCAB, 16, rngs=nnx.Rngs(0)))
    head = ScreenedHead(screen)
    with pytest.raises(ValueError, match="embedding: expected the rows"):
        head(case["hidden"])


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


def test_a_certificate_worked_by_hand():
    # The screen is off by (3, 4), (0, 1) and nothing: norms of 5, 1 and 0.
    rows = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], np.float32)
    coarse = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]], np.float32)
    errors = row_errors(rows, coarse)
    np.testing.assert_allclose(errors, [5, 1, 0], atol=2e-4)
    assert (np.asarray(errors) >= [5, 1, 0]).all()

    def head(errors, count):
        bias = np.array([0, 0, 1], np.float32)
        return ScreenedHead(
            lambda hidden: hidden @ coarse.T + bias,
            num_candidates=count,
            rows=rows,
            row_bias=bias,
            errors=errors,
        )

    hidden = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, -2.0]], np.float32)

    @jax.jit
    def look(hidden):
        one = head(errors, 1)
        return one.certified(hidden, 1), one.top_k(hidden, 1), head(errors, 2).certified(hidden, 1)

    # Bounds: (7.1, 2.4, 2), (5, 1, 2), (10, 0, 1); best logits of candidate 0: 7, 3 and -8.
    certified, top, two = look(hidden)
    np.testing.assert_array_equal(certified, [True, True, False])
    np.testing.assert_array_equal(two, [True, True, True])
    np.testing.assert_array_equal(top.indices[:, 0], [0, 0, 2])
    np.testing.assert_allclose(top.values[:, 0], [7, 3, 1], rtol=1e-6)
    # The screen's other logits, shifted by 7, would be larger.
    logits = jax.jit(head(errors, 1))
    np.testing.assert_array_equal(logits(hidden[:2]).argmax(-1), [0, 0])
    np.testing.assert_allclose(logits(hidden), hidden @ rows.T + [0, 0, 1], rtol=1e-6)
    # A tie outside the candidates is not certain: the lower token comes first.
    tied = jax.jit(lambda h: head(np.array([0, 9, 9], np.float32), 1).certified(h, 1))
    np.testing.assert_array_equal(tied(hidden[1:2]), [False])
    with pytest.raises(ValueError, match="errors: expected bounds"):
        head(None, 1).certified(hidden, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=EVERY_CHANGE)])
def test_certified_tops_are_the_full_head_s(dtype):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 32)).astype(np.float32)
    # Near ties, apart by less than the screen's error and by more than that of rounding.
    rows = np.tile(rows[:20], (10, 1)) + 1e-3 * rng.normal(size=(200, 32)).astype(np.float32)
    bias = rng.normal(size=200).astype(np.float32)
    bias[[3, 50]] = -np.inf
    hidden = rng.normal(size=(60, 32)).astype(np.float32) * 10.0 ** rng.uniform(-12, 12, (60, 1))
    rows, hidden = rows.astype(dtype), hidden.astype(dtype)
    codes = jax.jit(lambda rows: Codes.of(rows, "int8"))(rows)
    errors = jax.jit(lambda rows, codes: row_errors(rows, codes.dense()))(rows, codes)
    exact = np.asarray(hidden, np.float64) @ np.asarray(rows, np.float64).T + bias

    @functools.partial(jax.jit, static_argnames=("count", "k"))
    def look(hidden, count, k):
        head = ScreenedHead(
            lambda hidden: codes.product(hidden) + bias,
            num_candidates=count,
            rows=rows,
            row_bias=bias,
            errors=errors,
        )
        bounds = codes.product(hidden) + bias
        return head.certified(hidden, k), head.top_k(hidden, k), bounds

    shares = []
    for count, k in ((4, 1), (12, 5), (200, 5)):
        certified, top, scores = jax.device_get(look(hidden, count, k))
        shares.append(certified.mean())
        want = np.argsort(-exact, axis=-1, kind="stable")[:, :k]
        for at in range(len(hidden)):
            # Float32 may order what is closer than its rounding in another way.
            close = 1e-5 * np.abs(exact[at, want[at]]).max()
            np.testing.assert_allclose(exact[at, top.indices[at]], exact[at, want[at]], atol=close)
        finite = np.isfinite(bias)
        size = np.linalg.norm(np.asarray(hidden, np.float64), axis=-1)[:, None] * np.asarray(errors)
        room = size + 1e-6 * np.abs(np.where(finite, exact, 0))
        assert (np.abs((exact - scores)[:, finite]) <= room[:, finite]).all()
    assert 0 < shares[0] < 1
    assert 0 < shares[1] < 1
    assert shares[2] == 1
    # No position, and logits that are no numbers, which the full head decides.
    assert look(hidden[:0], 4, 1)[1].indices.shape == (0, 1)
    assert not look(hidden[:1] * np.nan, 4, 1)[0].any()
