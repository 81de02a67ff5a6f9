import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import distillation, ops
from tests._compiled import compiled

universal_logit_distance = compiled(distillation.universal_logit_distance)
top_k_of = compiled(ops.TopK.of)


def pair(shape=(2, 3), student_vocab=17, teacher_vocab=23):
    rng = np.random.default_rng(0)
    sizes = (student_vocab, teacher_vocab)
    return tuple((rng.normal(size=(*shape, n)) * 2).astype(np.float32) for n in sizes)


def oracle(student, teacher, top_k=None):
    def ranked(logits):
        probs = np.exp(np.asarray(logits, np.float64))
        return np.sort(probs / probs.sum(-1, keepdims=True), -1)[..., ::-1][..., :top_k]

    q, p = ranked(student), ranked(teacher)
    size = max(q.shape[-1], p.shape[-1])
    q, p = (np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]) for x in (q, p))
    return np.abs(p - q).sum(-1)


def test_by_hand():
    student, teacher = np.log(np.float32([0.1, 0.9])), np.log(np.float32([0.5, 0.2, 0.3]))
    full = universal_logit_distance(student, teacher, top_k=None)
    np.testing.assert_allclose(full, 0.4 + 0.2 + 0.2, rtol=1e-6)
    top = universal_logit_distance(student, teacher, top_k=1)
    np.testing.assert_allclose(top, 0.4, rtol=1e-6)


@pytest.mark.parametrize("top_k", [None, 4, 20])
def test_float64_oracle_either_way_round(top_k):
    for models in (pair(), pair()[::-1]):
        result = universal_logit_distance(*models, top_k=top_k)
        np.testing.assert_allclose(result, oracle(*models, top_k), rtol=1e-5)


def test_temperature():
    student, teacher = pair()
    expected = oracle(student / 2, teacher / 2, 4)
    result = universal_logit_distance(student, teacher, top_k=4, temperature=2.0)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_cached_teacher_equals_full_logits():
    student, teacher = pair()
    cached = top_k_of(teacher, 6)
    expected = universal_logit_distance(student, teacher, top_k=4)
    result = universal_logit_distance(student, cached, top_k=4)
    np.testing.assert_allclose(result, expected, rtol=1e-6)

    def both(student):
        return universal_logit_distance(top_k_of(student, 4), cached, top_k=4).sum()

    def dense(student):
        return universal_logit_distance(student, teacher, top_k=4).sum()

    grads = [jax.jit(jax.grad(f))(student) for f in (both, dense)]
    np.testing.assert_allclose(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("top_k", [None, 4])
def test_tokens_that_a_mask_leaves_out_count_for_nothing(top_k):
    student, teacher = pair()
    expected = universal_logit_distance(student, teacher, top_k=top_k)
    garbage = np.pad(student, ((0, 0), (0, 0), (0, 9)), constant_values=9.0)
    masked = universal_logit_distance(garbage, teacher, top_k=top_k, vocab_where=np.arange(26) < 17)
    np.testing.assert_allclose(masked, expected, rtol=1e-5)


distance = functools.partial(universal_logit_distance, top_k=None)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(top_k, student, teacher):
    def total(student, teacher):
        return universal_logit_distance(student, teacher, top_k=top_k).sum()

    return jax.value_and_grad(total, (0, 1))(student, teacher)


@hypothesis.given(
    hypothesis.extra.numpy.arrays(np.float32, (3, 8), elements=st.floats(-20, 20, width=32)),
    st.permutations(range(8)),
)
def test_properties(logits, order):
    first, second, third = logits
    np.testing.assert_allclose(distance(first, first[order]), 0.0, atol=1e-6)
    straight = np.asarray(distance(first, second))
    np.testing.assert_allclose(distance(first[order], second), straight, atol=1e-6)
    np.testing.assert_allclose(distance(second, first), straight, atol=1e-6)
    assert 0 <= straight <= 2 + 1e-6
    assert straight <= distance(first, third) + distance(third, second) + 1e-5
    assert distance(first, second, top_k=3) <= straight + 1e-6


@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        np.float32, (2, 3, 4), elements=st.floats(-1e4, 1e4, width=32) | st.just(-np.inf)
    )
)
@pytest.mark.parametrize("top_k", [None, 2])
def test_never_nan(top_k, logits):
    value, grads = value_and_grads(top_k, *logits)
    assert not np.isnan(value)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_errors_name_the_culprit():
    student, teacher = pair()
    with pytest.raises(
        ValueError, match="top_k: expected at most the larger vocabulary, 23, got 24"
    ):
        universal_logit_distance(student, teacher, top_k=24)
    with pytest.raises(ValueError, match="top_k: expected a positive number or None, got 0"):
        universal_logit_distance(student, teacher, top_k=0)
    cached = top_k_of(teacher, 6)
    with pytest.raises(ValueError, match="teacher: expected at least top_k=10 entries, got 6"):
        universal_logit_distance(student, cached)
    with pytest.raises(ValueError, match="top_k: expected a number, as teacher is a TopK"):
        universal_logit_distance(student, cached, top_k=None)
    with pytest.raises(ValueError, match="vocab_where: expected None, as student is a TopK"):
        universal_logit_distance(cached, student, top_k=4, vocab_where=np.ones(23, bool))
    with pytest.raises(ValueError, match=r"batch axes of student, \(2, 3\), got \(2, 2\)"):
        universal_logit_distance(student, teacher[:, :2], top_k=4)


@pytest.mark.parametrize("top_k", [4, None])
def test_sharded_vocabulary_without_axis_name_is_an_error(top_k):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    student, teacher = pair(student_vocab=16)
    sharded = jax.device_put(student, NamedSharding(mesh, P(None, None, "model")))
    with pytest.raises(ValueError, match=r"student: expected an unsharded vocab.* for a top-k"):
        universal_logit_distance(sharded, teacher, top_k=top_k)
