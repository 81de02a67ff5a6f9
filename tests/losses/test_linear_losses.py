"""Blocked losses against dense float64 oracles: values, gradients, masks, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax import losses
from tests._compiled import compiled

BATCH, LENGTH, HIDDEN, TEACHER_HIDDEN, VOCAB = 2, 11, 16, 24, 301
# Neither divides: 301 = 3 * 96 + 13, 11 = 2 * 4 + 3.
BLOCKS = losses.Blocks(vocab=96, tokens=4)
COLUMNS = losses.Blocks(vocab=96)
CAP, TEMPERATURE = 4.0, 1.7


def _normal(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape, scale=scale)


HIDDENS = _normal(0, BATCH, LENGTH, HIDDEN)
HEAD = _normal(1, HIDDEN, VOCAB, scale=0.5)
BIAS = _normal(2, VOCAB)
TEACHER_HIDDENS = _normal(3, BATCH, LENGTH, TEACHER_HIDDEN)
TEACHER_HEAD = _normal(4, VOCAB, TEACHER_HIDDEN, scale=0.4)
WEIGHTS = _normal(5, BATCH, LENGTH)
WHERE = np.arange(VOCAB) % 7 != 3
LABELS = np.random.default_rng(6).choice(np.flatnonzero(WHERE), (BATCH, LENGTH))


linear_cross_entropy = compiled(losses.linear_cross_entropy)


def _dense_logits(hidden, head, bias):
    return CAP * jnp.tanh((hidden @ head + bias) / CAP) / TEMPERATURE


def _teacher_logits():
    return TEACHER_HIDDENS @ TEACHER_HEAD.T / TEMPERATURE


def _plain_kl(p, q):
    p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return jnp.sum(jnp.exp(p) * (p - q), -1)


def _plain_jsd(student, teacher, beta):
    p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
    m = jnp.log(beta * p + (1 - beta) * q)
    return jnp.sum(beta * p * (jnp.log(p) - m) + (1 - beta) * q * (jnp.log(q) - m), -1)


def _plain_cross_entropy(student, teacher):
    log_z = jax.nn.logsumexp(student, -1)
    places = np.searchsorted(np.flatnonzero(WHERE), LABELS)
    label = jnp.take_along_axis(student, places[..., None], -1)[..., 0]
    return 0.9 * (log_z - label) + 0.1 * (log_z - student.mean(-1)) + 0.01 * log_z**2


def _against_teacher(function, **kwargs):
    def loss(hidden, head, bias, **more):
        return function(
            hidden,
            losses.Head(head, bias, soft_cap=CAP),
            TEACHER_HIDDENS.astype(hidden.dtype),
            TEACHER_HEAD.astype(head.dtype),
            temperature=TEMPERATURE,
            vocab_where=WHERE,
            **kwargs,
            **more,
        )

    return loss


def _cross_entropy(hidden, head, bias, **more):
    return losses.linear_cross_entropy(
        hidden,
        losses.Head(head, bias, soft_cap=CAP),
        LABELS,
        temperature=TEMPERATURE,
        vocab_where=WHERE,
        label_smoothing=0.1,
        z_loss=0.01,
        **more,
    )


# name: (ours, the formula on logits that exist only where WHERE)
CASES = {
    "cross_entropy": (_cross_entropy, _plain_cross_entropy),
    "forward_kl": (
        _against_teacher(losses.linear_kl_divergence),
        lambda s, t: TEMPERATURE**2 * _plain_kl(t, s),
    ),
    "reverse_kl": (
        _against_teacher(losses.linear_kl_divergence, direction="reverse"),
        lambda s, t: TEMPERATURE**2 * _plain_kl(s, t),
    ),
    "jensen_shannon": (
        _against_teacher(losses.linear_generalized_jensen_shannon, beta=0.3),
        functools.partial(_plain_jsd, beta=0.3),
    ),
}


@functools.cache
def _oracles():
    """Values and gradients of the weighted sums, float64, excluded columns cut away."""
    kept = np.flatnonzero(WHERE)

    def run(*arrays):
        def loss(formula, hidden, head, bias):
            student = _dense_logits(hidden, head, bias)[..., kept]
            values = formula(student, _teacher_logits()[..., kept])
            return jnp.sum(values * WEIGHTS), values

        return {
            name: jax.grad(functools.partial(loss, formula), (0, 1, 2), has_aux=True)(*arrays)[::-1]
            for name, (_, formula) in CASES.items()
        }

    with jax.enable_x64(True):
        return jax.device_get(jax.jit(run)(HIDDENS, HEAD, BIAS))


def _relative(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@functools.cache
def _run(name, dtype=np.float32):
    """Of each form of a weighted sum: (total, values or None), gradients by hidden, head, bias."""
    function = CASES[name][0]
    weights = WEIGHTS.astype(np.float32)

    def scalar(*arrays):
        return function(*arrays, weights=weights, blocks=BLOCKS), None

    def unreduced(*arrays):
        values = function(*arrays, blocks=BLOCKS)
        return jnp.sum(values * weights), values

    @jax.jit
    def run(*arrays):
        return {
            form.__name__: jax.value_and_grad(form, (0, 1, 2), has_aux=True)(*arrays)
            for form in (scalar, unreduced)
        }

    arrays = (HIDDENS, HEAD, BIAS)
    return jax.device_get(run(*(x.astype(dtype) for x in arrays)))


@pytest.mark.parametrize("form", ["unreduced", "scalar"])
@pytest.mark.parametrize("name", CASES)
def test_equals_float64_oracle(name, form):
    values, gradients = _oracles()[name]
    (total, got), got_gradients = _run(name)[form]
    assert abs(total - (values * WEIGHTS).sum()) < 1e-5 * np.abs(values * WEIGHTS).sum()
    if got is not None:
        assert got.dtype == jnp.float32
        assert _relative(got, values) < 1e-5
    for got, want in zip(got_gradients, gradients, strict=True):
        assert _relative(got, want) < 1e-5
    assert not got_gradients[1][:, ~WHERE].any()


@pytest.mark.parametrize("form", ["unreduced", "scalar"])
def test_bfloat16_stays_within_its_rounding(form):
    values, gradients = _oracles()["forward_kl"]
    (_, got), got_gradients = _run("forward_kl", jnp.bfloat16)[form]
    if got is not None:
        assert got.dtype == jnp.float32
        assert _relative(got, values) < 0.03
    for got, want in zip(got_gradients, gradients, strict=True):
        assert got.dtype == jnp.bfloat16
        assert _relative(got, want) < 0.03


def test_of_bfloat16_inputs_nothing_more_is_rounded():
    """Normalisers are those of the inputs as they are; 1 - p is none of a rounded p."""
    hidden, head = (x.astype(jnp.bfloat16) for x in (HIDDENS, HEAD))
    # p = 0.9995 of the first of two entries: a bfloat16 next to it is 1.
    sure, labels = np.array([[7.59375, 0.0]]).astype(jnp.bfloat16), np.zeros(1, np.int32)

    def run(hidden, head, one):
        def loss(one, engine):
            blocks, weights = losses.Blocks(engine=engine), jnp.ones(1)
            return losses.linear_cross_entropy(one, sure, labels, weights=weights, blocks=blocks)

        slopes = [jax.grad(loss)(one, engine) for engine in ("scan", "rows")]
        return losses.linear_readout(hidden, head, blocks=BLOCKS).log_z, slopes

    log_z, slopes = jax.device_get(jax.jit(run)(hidden, head, np.ones((1, 1), jnp.bfloat16)))
    logits = hidden.astype(np.float64) @ head.astype(np.float64)
    np.testing.assert_allclose(log_z, np.log(np.exp(logits).sum(-1)), atol=1e-5)
    for slope in slopes:
        np.testing.assert_allclose(slope.astype(float), -7.59375 / (1 + np.exp(7.59375)), rtol=0.01)


def test_head_layouts_agree_and_default_blocks_work():
    def loss(head):
        return losses.linear_cross_entropy(HIDDENS.astype(np.float32), head, LABELS).sum()

    head = HEAD.astype(np.float32)
    run = jax.jit(jax.value_and_grad(loss))
    value, gradient = run(head)
    value_t, gradient_t = run(head.T)
    np.testing.assert_allclose(value, value_t, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.asarray(gradient_t).T, atol=1e-6)
    logits = HIDDENS.astype(np.float32) @ head
    dense = np.asarray(compiled(losses.cross_entropy)(logits, LABELS)).sum()
    np.testing.assert_allclose(value, dense, rtol=1e-6)


def test_readout_gives_statistics_and_their_gradients():
    hidden, head = HIDDENS.astype(np.float32), HEAD.astype(np.float32)
    ids = np.random.default_rng(7).integers(0, VOCAB, (BATCH, LENGTH, 5))

    def numbers(readout):
        s = readout
        return [s.values, s.log_z, s.mean, s.std]

    def blocked(hidden, head):
        r = losses.linear_readout(hidden, head, ids=ids, top_k=9, vocab_where=WHERE, blocks=BLOCKS)
        return r.statistics, jnp.where(jnp.isfinite(r.gathered), r.gathered, 0.0)

    def dense(hidden, head):
        logits = hidden @ head
        gathered = jnp.where(WHERE[ids], jnp.take_along_axis(logits, ids, -1), 0.0)
        return losses.graph_statistics(logits, 9, vocab_where=WHERE), gathered

    def total(function):
        def run(hidden, head):
            statistics, gathered = function(hidden, head)
            parts = [*numbers(statistics), gathered]
            return sum(
                (jnp.cos(i + p) * WEIGHTS.reshape(p.shape[:2] + (1,) * (p.ndim - 2))).sum()
                for i, p in enumerate(parts)
            ), statistics

        return jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(hidden, head)

    (value, statistics), gradients = total(blocked)
    (want, want_statistics), want_gradients = total(dense)
    np.testing.assert_array_equal(statistics.indices, want_statistics.indices)
    for got, expected in zip(numbers(statistics), numbers(want_statistics), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, expected in zip(gradients, want_gradients, strict=True):
        assert _relative(got, expected) < 1e-5


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_an_offset_that_both_sides_share_costs_the_divergence_no_digits(direction):
    eye = np.eye(8, dtype=np.float32)
    heads = [(_normal(s, 8, VOCAB, scale=2.0) + 3000).astype(np.float32) for s in (7, 8)]
    value = compiled(losses.linear_kl_divergence)(
        eye, heads[0], eye, heads[1], direction=direction, blocks=COLUMNS
    )
    # The logits are the heads themselves, so float64 sees the same numbers.
    q, p = (x - x.max(-1, keepdims=True) for x in (h.astype(np.float64) for h in heads))
    q, p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (q, p))
    over, under = (p, q) if direction == "forward" else (q, p)
    np.testing.assert_allclose(value, (np.exp(over) * (over - under)).sum(-1), atol=5e-6)


def test_infinite_divergence_has_a_finite_gradient():
    """As the dense losses: infinite where mass meets an entry that the other lacks."""
    hidden, head = HIDDENS[0, :3].astype(np.float32), HEAD.astype(np.float32)
    teacher, teacher_head = (x.astype(np.float32) for x in (TEACHER_HIDDENS[0, :3], TEACHER_HEAD))
    absent = np.where(np.arange(VOCAB) < 4, -np.inf, 0.0).astype(np.float32)
    for direction, biases in (("forward", (absent, None)), ("reverse", (None, absent))):

        def linear(hidden, direction=direction, biases=biases):
            ours, teacher_side = losses.Head(head, biases[0]), losses.Head(teacher_head, biases[1])
            return losses.linear_kl_divergence(
                hidden, ours, teacher, teacher_side, direction=direction, blocks=COLUMNS
            )

        def dense(hidden, direction=direction, biases=biases):
            student, other = hidden @ head, teacher @ teacher_head.T
            if biases[0] is not None:
                student = student + absent
            else:
                other = other + absent
            return losses.kl_divergence(student, other, direction=direction)

        @jax.jit
        def both(hidden, functions=(linear, dense)):
            return [jax.value_and_grad(lambda h, f=f: f(h).sum())(hidden) for f in functions]

        (got_value, got), (want_value, want) = both(hidden)
        assert np.isposinf(got_value)
        assert np.isposinf(want_value)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-6)


def test_padding_by_minus_infinity_equals_no_padding():
    hidden, head = HIDDENS.astype(np.float32), HEAD.astype(np.float32)
    padded = np.pad(head, [(0, 0), (0, 50)])
    bias = np.where(np.arange(VOCAB + 50) < VOCAB, 0.0, -np.inf).astype(np.float32)

    def plain(head):
        return losses.linear_cross_entropy(hidden, head, LABELS, blocks=COLUMNS).sum()

    def with_padding(head):
        whole = losses.Head(head, bias)
        return losses.linear_cross_entropy(hidden, whole, LABELS, blocks=COLUMNS).sum()

    value, gradient = jax.jit(jax.value_and_grad(plain))(head)
    run = jax.jit(jax.value_and_grad(with_padding))
    padded_value, padded_gradient = jax.device_get(run(padded))
    np.testing.assert_allclose(value, padded_value, rtol=1e-6)
    np.testing.assert_allclose(padded_gradient[:, :VOCAB], gradient, atol=1e-6)
    assert not padded_gradient[:, VOCAB:].any()


def test_foreign_labels_are_nan_and_silenced_by_weight_zero():
    hidden, head = HIDDENS.astype(np.float32), HEAD.astype(np.float32)
    labels = LABELS.copy()
    labels[0, 0], labels[1, 3] = -100, VOCAB
    values = np.asarray(linear_cross_entropy(hidden, head, labels, blocks=COLUMNS))
    assert np.isnan(values[0, 0])
    assert np.isnan(values[1, 3])
    assert np.isfinite(values).sum() == values.size - 2
    weights = np.where((labels >= 0) & (labels < VOCAB), np.float32(1), 0)
    scalar = jax.jit(
        jax.value_and_grad(lambda h: losses.linear_cross_entropy(h, head, labels, weights=weights))
    )
    value, gradient = jax.device_get(scalar(hidden))
    np.testing.assert_allclose(value, np.nansum(values), rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert not gradient[0, 0].any()


def test_vmap_and_no_batch_axes():
    hidden, head = HIDDENS.astype(np.float32), HEAD.astype(np.float32)
    loss = functools.partial(losses.linear_cross_entropy, blocks=COLUMNS)
    want = np.asarray(linear_cross_entropy(hidden, head, LABELS, blocks=COLUMNS))
    by_row = jax.jit(jax.vmap(loss, (0, None, 0)))(hidden, head, LABELS)
    np.testing.assert_allclose(by_row, want, rtol=1e-6)
    alone = linear_cross_entropy(hidden[1, 2], head, LABELS[1, 2], blocks=COLUMNS)
    np.testing.assert_allclose(alone, want[1, 2], rtol=1e-6)


def _temp_bytes(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.grad(function, (0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("form", ["unreduced", "scalar"])
def test_scratch_memory_is_a_small_share_of_dense(form):
    tokens, width, vocab = 1024, 64, 65536
    shapes = ((tokens, width), (width, vocab)) * 2
    weights = np.ones(tokens, np.float32)

    def dense(x, w, xt, wt):
        return losses.kl_divergence(x @ w, jax.lax.stop_gradient(xt @ wt)).sum()

    def blocked(x, w, xt, wt):
        if form == "scalar":
            blocks = losses.Blocks(vocab=2048, tokens=32)
            return losses.linear_kl_divergence(x, w, xt, wt, weights=weights, blocks=blocks)
        return losses.linear_kl_divergence(x, w, xt, wt, blocks=losses.Blocks(vocab=2048)).sum()

    assert _temp_bytes(blocked, *shapes) < _temp_bytes(dense, *shapes) / 10


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (np.zeros((5, 6)), {}, "head: expected a kernel with 16 entries"),
        (np.zeros((HIDDEN, HIDDEN)), {}, "head: .* is square: expected a Head with vocab_axis"),
        (losses.Head(HEAD, np.zeros(3)), {}, r"head\.bias: expected shape \(301,\)"),
        (HEAD, dict(vocab_where=np.ones(3, bool)), "vocab_where: expected a boolean mask"),
        (HEAD, dict(temperature=0.0), "temperature: expected a positive number"),
    ],
)
def test_errors_name_the_argument(head, options, message):
    with pytest.raises(ValueError, match=message):
        losses.linear_cross_entropy(HIDDENS, head, LABELS, **options)


def test_heads_and_blocks_name_what_they_refuse():
    with pytest.raises(ValueError, match="vocab_axis: expected 0, 1 or None, got 2"):
        losses.Head(HEAD, vocab_axis=2)
    with pytest.raises(ValueError, match="soft_cap: expected a positive number"):
        losses.Head(HEAD, soft_cap=0.0)
    with pytest.raises(ValueError, match=r"blocks\.vocab: expected a positive size, got 0"):
        losses.Blocks(vocab=0)
    with pytest.raises(TypeError, match=r"head\.kernel: expected floating point, got int"):
        losses.Head(np.zeros((HIDDEN, VOCAB), int)).logits(HIDDENS)


def test_a_head_is_a_tree_whose_gradient_is_a_head():
    head = losses.Head(HEAD.T.astype(np.float32), BIAS.astype(np.float32), 0, CAP)
    hidden = HIDDENS.astype(np.float32)

    def loss(head):
        return losses.linear_cross_entropy(hidden, head, LABELS, blocks=BLOCKS).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(head)
    want, dense = jax.jit(
        jax.value_and_grad(lambda head: losses.cross_entropy(head.logits(hidden), LABELS).sum())
    )(head)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert isinstance(gradient, losses.Head)
    assert (gradient.vocab_axis, gradient.soft_cap) == (0, CAP)
    assert _relative(gradient.kernel, dense.kernel) < 1e-5
    assert _relative(gradient.bias, dense.bias) < 1e-5
    # Two heads in one: as the members of an ensemble are held.
    halved = jax.tree.map(lambda x: np.float32(0.5) * x, head)
    both = jax.tree.map(lambda *x: np.stack(x), head, halved)
    together = np.asarray(jax.jit(jax.vmap(loss))(both))
    np.testing.assert_allclose(together, [value, jax.jit(loss)(halved)], rtol=1e-5)


def test_an_entry_whose_bias_is_minus_infinity_does_not_exist_under_a_cap():
    hidden, bias = HIDDENS.astype(np.float32), np.where(WHERE, np.float32(0), -np.inf)
    head = losses.Head(HEAD.astype(np.float32), bias, 1, CAP)
    masked = losses.Head(head.kernel, None, 1, CAP)
    got = linear_cross_entropy(hidden, head, LABELS, blocks=BLOCKS)
    want = linear_cross_entropy(hidden, masked, LABELS, vocab_where=WHERE, blocks=BLOCKS)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda h: losses.cross_entropy(h.logits(hidden), LABELS).sum()))(
        head
    )
    assert np.isfinite(gradient.kernel).all()


def test_other_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="teacher_head: expected the vocabulary of head"):
        losses.linear_kl_divergence(
            HIDDENS.astype(np.float32),
            HEAD.astype(np.float32),
            TEACHER_HIDDENS.astype(np.float32),
            TEACHER_HEAD[:-1].astype(np.float32),
        )


HALVES = np.float32([[0.0, 0.0, -np.inf], [-np.inf, 0.0, 0.0]])
ONE, FLAT = np.ones((1, 1), np.float32), np.zeros((3, 1), np.float32)


def test_jensen_shannon_of_halves_that_overlap_by_hand():
    """q = (1/2, 1/2, 0) and p = (0, 1/2, 1/2), m = (1/4, 1/2, 1/4): each part is log(2) / 2."""

    def loss(hidden):
        ours, teacher_head = (losses.Head(FLAT, bias, 0) for bias in HALVES)
        return losses.linear_generalized_jensen_shannon(hidden, ours, ONE, teacher_head).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(ONE)
    np.testing.assert_allclose(value, 0.5 * np.log(2), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_a_teacher_gets_no_gradient_of_any_order():
    student, teacher = _normal(9, 2, 3).astype(np.float32), _normal(10, 2, 3).astype(np.float32)
    head = _normal(11, 3, 5).astype(np.float32)

    def loss(student, teacher):
        return losses.linear_kl_divergence(student, head, teacher, head).sum()

    def slope(student, teacher):
        return jnp.square(jax.grad(loss)(student, teacher)).sum()

    ours, teacher_gradient = jax.jit(jax.grad(slope, (0, 1)))(student, teacher)
    assert ours.any()
    assert not teacher_gradient.any()


def test_the_gradient_of_weights_is_the_losses_and_zero_where_a_silent_one_is_no_number():
    labels, weights = np.array([1, 0, -100]), np.float32([0.5, 0.0, 0.0])
    head = losses.Head(FLAT, np.float32([0.0, 1.0, 2.0]), 0)

    def loss(weights, engine):
        blocks = losses.Blocks(engine=engine)
        hidden = np.repeat(ONE, 3, 0)
        return losses.linear_cross_entropy(hidden, head, labels, weights=weights, blocks=blocks)

    log_z = np.log(np.exp(np.arange(3.0)).sum())
    both = jax.jit(lambda weights: [jax.grad(loss)(weights, engine) for engine in ("rows", "scan")])
    for gradient in both(weights):
        np.testing.assert_allclose(gradient, [log_z - 1, log_z, 0.0], rtol=1e-6)


def test_labels_and_ids_outside_the_vocabulary_have_no_number_in_a_readout():
    labels = np.array([-100, 0, 2, 3])
    readout = compiled(losses.linear_readout)(
        np.repeat(ONE, 4, 0), losses.Head(FLAT, vocab_axis=0), labels=labels, ids=labels[:, None]
    )
    expected = [np.nan, np.log(3), np.log(3), np.nan]
    np.testing.assert_allclose(readout.cross_entropy, expected, rtol=1e-6)
    np.testing.assert_array_equal(readout.gathered, np.float32([[np.nan], [0], [0], [np.nan]]))


def test_rows_of_a_head_are_those_of_its_tokens_whichever_way_it_lies():
    for head in (losses.Head(HEAD, vocab_axis=1), losses.Head(HEAD.T, vocab_axis=0)):
        np.testing.assert_array_equal(head.rows, HEAD.T.astype(np.float32))
