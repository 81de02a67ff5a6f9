"""Losses against a teacher of which only the top logits are known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from logitjax import losses, ops
from tests._compiled import compiled
from tests._marks import EVERY_CHANGE

BATCH, LENGTH, HIDDEN, VOCAB, K = 2, 7, 8, 150, 12
BLOCKS = losses.Blocks(vocab=64, tokens=3)


def _normal(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape, scale=scale).astype(np.float32)


X, W, B = _normal(0, BATCH, LENGTH, HIDDEN), _normal(1, VOCAB, HIDDEN), _normal(2, VOCAB)
TEACHER_LOGITS = _normal(3, BATCH, LENGTH, VOCAB, scale=3.0)
top_k_of, sample_tail = compiled(ops.TopK.of), compiled(losses.TailSample.draw)
sparse_kl = compiled(losses.sparse_kl_divergence)
linear_sparse_kl = compiled(losses.linear_sparse_kl_divergence)
kl_divergence = compiled(losses.kl_divergence)
TEACHER = jax.device_get(top_k_of(TEACHER_LOGITS, K))
LABELS = np.random.default_rng(4).integers(0, VOCAB, (BATCH, LENGTH))
WEIGHTS = _normal(5, BATCH, LENGTH)


def _merged(logits):
    """The distribution over the teacher's top tokens and everything else, float64."""
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    top = np.take_along_axis(p, np.asarray(TEACHER.indices), -1)
    return np.concatenate([top, 1 - top.sum(-1, keepdims=True)], -1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_equals_kl_after_merging_the_tail(direction):
    logits = X @ W.T + B
    p, q = _merged(TEACHER_LOGITS), _merged(logits)
    over, under = (p, q) if direction == "forward" else (q, p)
    want = (over * np.log(over / under)).sum(-1)
    got = sparse_kl(logits, TEACHER, direction=direction)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    full = np.asarray(kl_divergence(logits, TEACHER_LOGITS, direction=direction))
    assert (np.asarray(got) <= full * (1 + 1e-5)).all()


def test_all_entries_kept_give_the_full_divergence():
    logits = X @ W.T
    teacher = top_k_of(TEACHER_LOGITS, VOCAB)
    want = kl_divergence(logits, TEACHER_LOGITS)
    np.testing.assert_allclose(sparse_kl(logits, teacher), want, atol=1e-5)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_infinite_where_the_student_lacks_a_token_of_the_teacher_s(tail):
    logits, lost = X @ W.T, int(TEACHER.indices[0, 0, 3])
    kept = np.arange(VOCAB) != lost
    expected = (TEACHER.indices == lost).any(-1)

    @jax.jit
    def both(logits):
        forward, reverse = (
            losses.sparse_kl_divergence(
                logits, TEACHER, direction=direction, tail=tail, vocab_where=kept
            )
            for direction in ("forward", "reverse")
        )
        linear = losses.linear_sparse_kl_divergence(X, W, TEACHER, tail=tail, vocab_where=kept)
        return forward, reverse, linear

    forward, reverse, linear = both(logits)
    np.testing.assert_array_equal(np.isposinf(forward), expected)
    np.testing.assert_array_equal(np.isposinf(linear), expected)
    # The student gives the token nothing, so that nothing of its own is missing in the teacher.
    assert np.isfinite(reverse).all()
    assert not np.isnan(forward).any()


@jax.jit
@jax.value_and_grad
def value_and_gradient(logits, teacher):
    return losses.sparse_kl_divergence(logits, teacher).sum()


def test_zero_with_zero_gradient_where_the_student_agrees():
    value, gradient = value_and_gradient(TEACHER_LOGITS, TEACHER)
    assert abs(float(value)) < 1e-5
    assert np.abs(gradient).max() < 1e-5


def test_renormalised_tail_takes_a_temperature():
    logits = X @ W.T
    at_top = np.take_along_axis(logits, TEACHER.indices, -1)
    want = kl_divergence(at_top, TEACHER.values, temperature=2.0)
    got = sparse_kl(logits, TEACHER, tail="renormalize", temperature=2.0)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    linear = linear_sparse_kl(X, W, TEACHER, tail="renormalize", temperature=2.0, blocks=BLOCKS)
    np.testing.assert_allclose(linear, want, rtol=1e-5)
    with pytest.raises(ValueError, match="temperature: expected 1 without tail='renormalize'"):
        losses.sparse_kl_divergence(logits, TEACHER, temperature=2.0)


def _dense(x, w, b):
    logits = x @ w.T + b
    values = losses.sparse_kl_divergence(logits, TEACHER)
    return jnp.sum(WEIGHTS * (values + 0.3 * losses.cross_entropy(logits, LABELS)))


def _bucket(x, w, b):
    return jnp.sum(WEIGHTS * losses.sparse_kl_divergence(x @ w.T + b, TEACHER))


def _unreduced(x, w, b):
    return jnp.sum(
        WEIGHTS * losses.linear_sparse_kl_divergence(x, losses.Head(w, b), TEACHER, blocks=BLOCKS)
    )


def _scalar(x, w, b):
    return losses.linear_sparse_kl_divergence(
        x, losses.Head(w, b), TEACHER, weights=WEIGHTS, blocks=BLOCKS
    )


def _fused(x, w, b):
    def loss(readout, teacher):
        return losses.sparse_kl_divergence(readout, teacher) + 0.3 * readout.cross_entropy

    return losses.linear_fused_loss(
        x,
        losses.Head(w, b),
        loss,
        TEACHER,
        WEIGHTS,
        labels=LABELS,
        ids=TEACHER.indices,
        blocks=BLOCKS,
    )[0]


SAMPLES = 6
KEY = jax.random.key(0)
SAMPLE = jax.device_get(sample_tail(KEY, TEACHER_LOGITS, TEACHER.indices, SAMPLES))


def test_tail_samples_follow_the_tail():
    logits = np.float32([3.0, 1.0, -np.inf, 2.0, 0.0, 3.5])
    drawn = sample_tail(KEY, logits, np.array([5, 0]), 20_000)
    counts = np.bincount(drawn.indices, minlength=6)
    p = np.exp([1.0, 2.0, 0.0])
    expected = 20_000 * p / p.sum()
    assert counts[[0, 2, 5]].sum() == 0
    # Chi-square with two degrees of freedom: 13.8 is its 99.9th percentile.
    assert (np.square(counts[[1, 3, 4]] - expected) / expected).sum() < 13.8
    np.testing.assert_array_equal(drawn.values, logits[np.asarray(drawn.indices)])


def test_nothing_left_to_draw_costs_nothing():
    logits = np.float32([1.0, -np.inf, 0.0])
    top = top_k_of(logits, 2)
    drawn = sample_tail(KEY, logits, top.indices, 2)
    assert (np.asarray(drawn.values) == -np.inf).all()
    student = np.float32([0.0, -np.inf, 0.5])
    value, gradient = jax.jit(
        jax.value_and_grad(lambda z: losses.sparse_kl_divergence(z, top, tail=drawn))
    )(student)
    np.testing.assert_allclose(value, kl_divergence(student, logits), rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "drawer", ["teacher", "student", pytest.param("older student", marks=EVERY_CHANGE)]
)
def test_few_draws_of_the_tail_estimate_both_divergences_and_their_gradients(drawer):
    """The mean over draws is within three standard errors, and the bucket is not."""
    student, teacher = (x[0, 0, :9] for x in ((X @ W.T) / 2, TEACHER_LOGITS / 2))
    law = {"teacher": teacher, "student": student, "older student": student + B[:9] / 2}[drawer]
    top = np.argsort(-law)[:3]
    teacher_top = ops.TopK(teacher[top], top, np.float32(np.log(np.exp(teacher).sum())))

    def estimate(z, key, direction):
        drawn = losses.TailSample.draw(key, law, top, 2)
        log_probs = None if drawer == "teacher" else drawn.log_probs
        tail = dataclasses.replace(
            drawn, values=jnp.asarray(teacher)[drawn.indices], log_probs=log_probs
        )
        return losses.sparse_kl_divergence(z, teacher_top, direction=direction, tail=tail)

    @jax.jit
    def run(student):
        keys, errors = jax.random.split(KEY, 20_000), {}
        for direction in ("forward", "reverse"):
            one = functools.partial(estimate, direction=direction)
            value, slope = jax.vmap(jax.value_and_grad(one), (None, 0))(student, keys)
            kl = functools.partial(losses.kl_divergence, direction=direction)
            exact, true = jax.value_and_grad(kl)(student, teacher)
            bucket = losses.sparse_kl_divergence(student, teacher_top, direction=direction)
            draws, expected = jnp.c_[value, slope], jnp.append(exact, true)
            error = draws.std(0) / np.sqrt(len(keys)) + 1e-6
            errors[direction] = (draws.mean(0) - expected) / error, (bucket - exact) / error[0]
        return errors

    for direction, (away, bucket) in jax.device_get(run(student)).items():
        assert (np.abs(away) < 3).all(), direction
        assert bucket < -3, direction


@pytest.mark.parametrize("direction", ["forward", pytest.param("reverse", marks=EVERY_CHANGE)])
def test_linear_sampled_tail_equals_dense(direction):
    def dense(x, w):
        loss = losses.sparse_kl_divergence(x @ w.T, TEACHER, tail=SAMPLE, direction=direction)
        return (loss * WEIGHTS).sum()

    def linear(x, w, weights=None):
        options = dict(tail=SAMPLE, weights=weights, blocks=BLOCKS, direction=direction)
        loss = losses.linear_sparse_kl_divergence(x, w, TEACHER, **options)
        return loss if weights is not None else (loss * WEIGHTS).sum()

    value, gradients = jax.jit(jax.value_and_grad(dense, (0, 1)))(X, W)
    for form in (linear, functools.partial(linear, weights=WEIGHTS)):
        got, linear_gradients = jax.jit(jax.value_and_grad(form, (0, 1)))(X, W)
        np.testing.assert_allclose(got, value, rtol=1e-5)
        for a, b in zip(linear_gradients, gradients, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(np.asarray(b)).max())


def test_sampled_tails_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="samples: expected at least 1"):
        losses.TailSample.draw(KEY, TEACHER_LOGITS, TEACHER.indices, 0)


@functools.cache
def _expected(form):
    return jax.device_get(jax.jit(jax.value_and_grad(form, (0, 1, 2)))(X, W, B))


@pytest.mark.parametrize(
    ("form", "dense"), [(_unreduced, _bucket), (_scalar, _bucket), (_fused, _dense)]
)
def test_linear_forms_equal_dense(form, dense):
    value, gradients = jax.device_get(jax.jit(jax.value_and_grad(form, (0, 1, 2)))(X, W, B))
    want, want_gradients = _expected(dense)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, expected in zip(gradients, want_gradients, strict=True):
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_fused_loss_returns_what_metrics_need():
    def loss(readout, _):
        return jnp.square(readout.log_z)

    value, readout = compiled(losses.linear_fused_loss)(
        X, W, loss, (), WEIGHTS, labels=LABELS, top_k=3, blocks=BLOCKS
    )
    want = compiled(losses.linear_readout)(X, W, labels=LABELS, top_k=3, blocks=BLOCKS)
    np.testing.assert_allclose(value, (WEIGHTS * np.asarray(want.log_z) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(readout.cross_entropy, want.cross_entropy, rtol=1e-5)
    np.testing.assert_array_equal(readout.statistics.indices, want.statistics.indices)


def test_a_vocabulary_smaller_than_k_pads_with_minus_infinity():
    values = np.where(np.arange(K) < K - 2, TEACHER.values, -np.inf)
    teacher = ops.TopK(values=values, indices=TEACHER.indices, log_z=TEACHER.log_z)
    value, gradient = value_and_gradient(TEACHER_LOGITS, teacher)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_the_teacher_gets_no_gradient(tail):
    def loss(values, log_z):
        teacher = ops.TopK(values, TEACHER.indices, log_z)
        return losses.sparse_kl_divergence(X @ W.T, teacher, tail=tail).sum()

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(TEACHER.values, TEACHER.log_z):
        assert not gradient.any()


def test_a_token_of_no_mass_may_be_missing_in_the_student():
    teacher = ops.TopK(np.float32([0.0, -200.0]), np.array([0, 1]), np.float32(0.0))
    student, exists = np.zeros(3, np.float32), np.array([True, False, True])
    value = sparse_kl(student, teacher, tail="renormalize", vocab_where=exists)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)


def test_the_student_s_own_top_k_is_refused_and_its_readout_at_the_teacher_s_ids_is_right():
    logits = X @ W.T
    with pytest.raises(TypeError, match="TopK"):
        losses.sparse_kl_divergence(top_k_of(logits, K), TEACHER)
    readout = losses.Readout(
        ops.logsumexp(logits), gathered=np.take_along_axis(logits, TEACHER.indices, -1)
    )
    np.testing.assert_allclose(sparse_kl(readout, TEACHER), sparse_kl(logits, TEACHER), rtol=1e-5)
    # At one position by another order.
    ids = TEACHER.indices.copy()
    ids[1, 2] = ids[1, 2, ::-1]
    read = compiled(losses.linear_readout)(X, W, ids=ids, blocks=BLOCKS)
    missing = np.isnan(sparse_kl(read, TEACHER))
    assert missing[1, 2]
    assert missing.sum() == 1


def test_an_infinite_logit_outside_the_teacher_s_top_k_has_no_finite_divergence():
    logits = X @ W.T
    logits[0, 0, np.setdiff1d(np.arange(VOCAB), TEACHER.indices[0, 0])[0]] = np.inf
    for direction in ("forward", "reverse"):
        finite = np.isfinite(sparse_kl(logits, TEACHER, direction=direction))
        assert not finite[0, 0]
        assert finite.ravel()[1:].all()
        # A teacher's own: the reverse once was minus infinity.
        values = TEACHER.values.copy()
        values[0, 0, 0] = np.inf
        divergence = sparse_kl(
            X @ W.T, ops.TopK(values, TEACHER.indices, TEACHER.log_z), direction=direction
        )
        assert np.isnan(divergence[0, 0])
        assert np.isfinite(divergence.ravel()[1:]).all()


@pytest.mark.parametrize("engine", ["scan", "rows"])
def test_a_tpu_scatters_nothing(engine):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def text(platform):
        def loss(hidden, head, teacher):
            blocks = losses.Blocks(engine=engine, vocab=128)
            options = dict(weights=jnp.ones(16), blocks=blocks)
            return losses.linear_sparse_kl_divergence(hidden, head, teacher, **options)

        number = array(16, 8, dtype=jnp.float32)
        teacher = ops.TopK(number, array(16, 8, dtype=jnp.int32), array(16, dtype=jnp.float32))
        device = jax.sharding.AbstractDevice(
            device_kind=platform, num_cores=None, platform=platform
        )
        axes = (("data",), (AxisType.Auto,))
        mesh = jax.sharding.AbstractMesh((1,), *axes, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(jax.grad(loss, (0, 1))).trace(array(16, 8), array(8, 1000), teacher)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.scatter" in text("cpu")
    for_tpu = text("tpu")
    assert "stablehlo.scatter" not in for_tpu
    assert "stablehlo.gather" not in for_tpu
