import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from logitjax import losses
from tests._compiled import compiled

kl_divergence = compiled(losses.kl_divergence)
reverse_kl = functools.partial(kl_divergence, direction="reverse")
generalized_jensen_shannon = compiled(losses.generalized_jensen_shannon)
DIVERGENCES = {
    "forward_kl": kl_divergence,
    "reverse_kl": reverse_kl,
    "jensen_shannon": generalized_jensen_shannon,
}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)

finite_logits = hypothesis.extra.numpy.arrays(
    np.float32, (2, 3, 6), elements=st.floats(-20, 20, width=32)
)
any_logits = hypothesis.extra.numpy.arrays(
    np.float32, (2, 3, 4), elements=st.floats(-1e4, 1e4, width=32) | st.just(-np.inf)
)


def pair(shape=(3, 11)):
    rng = np.random.default_rng(0)
    return tuple((rng.normal(size=shape) * 2).astype(np.float32) for _ in range(2))


def softmax(logits):
    probs = np.exp(np.asarray(logits, np.float64))
    return probs / probs.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def test_by_hand():
    student, teacher = np.log(np.float32([[0.5, 0.5], [0.25, 0.75]]))
    forward = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    np.testing.assert_allclose(kl_divergence(student, teacher), forward, rtol=1e-5)
    backward = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(reverse_kl(student, teacher), backward, rtol=1e-5)
    mixed = 0.5 * (0.25 * np.log(2 / 3) + 0.75 * np.log(1.2))
    mixed += 0.5 * (0.5 * np.log(4 / 3) + 0.5 * np.log(0.8))
    jensen_shannon = generalized_jensen_shannon(student, teacher)
    np.testing.assert_allclose(jensen_shannon, mixed, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float64_oracle(temperature):
    student, teacher = pair()
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    options = {"temperature": np.float32(temperature)}
    forward = kl_divergence(student, teacher, **options)
    np.testing.assert_allclose(forward, temperature**2 * kl(p, q), rtol=1e-5)
    backward = reverse_kl(student, teacher, **options)
    np.testing.assert_allclose(backward, temperature**2 * kl(q, p), rtol=1e-5)
    for beta in (0.1, 0.5, 0.9):
        m = beta * p + (1 - beta) * q
        expected = beta * kl(p, m) + (1 - beta) * kl(q, m)
        result = generalized_jensen_shannon(student, teacher, beta=beta, **options)
        np.testing.assert_allclose(result, expected, rtol=1e-4)


def test_ends_of_the_jensen_shannon_family_are_the_two_kls():
    """Beta weighs the teacher, so beta -> 0 leaves KL(teacher || student): TRL's convention."""
    student, teacher = pair()
    ends = [generalized_jensen_shannon(student, teacher, beta=beta) for beta in (0, 1)]
    np.testing.assert_allclose(ends[0], kl_divergence(student, teacher), rtol=1e-6)
    np.testing.assert_allclose(ends[1], reverse_kl(student, teacher), rtol=1e-6)
    for beta, end in ((1e-3, ends[0]), (1 - 1e-3, ends[1])):
        near = generalized_jensen_shannon(student, teacher, beta=beta)
        np.testing.assert_allclose(near / np.float32(1e-3), end, rtol=0.1)


def test_gradient_of_forward_kl_is_the_difference_of_probabilities():
    student, teacher = pair()
    grad = jax.jit(jax.grad(lambda s: kl_divergence(s, teacher, temperature=2.0).sum()))(student)
    expected = 2 * (softmax(student / 2) - softmax(teacher / 2))
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(divergence, student, teacher):
    return jax.value_and_grad(lambda s, t: divergence(s, t).sum(), (0, 1))(student, teacher)


@hypothesis.given(finite_logits)
@every_divergence
def test_properties(divergence, logits):
    student, teacher = logits
    value = np.asarray(divergence(student, teacher))
    assert (value >= -1e-6).all()
    np.testing.assert_allclose(divergence(student, student), 0.0, atol=1e-6)
    shifted = divergence(student + np.float32(3), teacher)
    np.testing.assert_allclose(shifted, value, rtol=1e-3, atol=1e-5)
    if divergence is generalized_jensen_shannon:
        swapped = divergence(teacher, student)
        np.testing.assert_allclose(swapped, value, rtol=1e-4, atol=1e-6)


@hypothesis.given(any_logits)
@every_divergence
def test_never_nan(divergence, logits):
    value, grads = value_and_grads(divergence, *logits)
    assert not np.isnan(value)
    assert all(np.isfinite(grad).all() for grad in grads)


@every_divergence
def test_tokens_that_a_mask_leaves_out_count_for_nothing(divergence):
    student, teacher = pair()
    garbage = [np.pad(x, ((0, 0), (0, 5)), constant_values=5.0) for x in (student, teacher)]
    masked = divergence(*garbage, vocab_where=np.arange(16) < 11)
    np.testing.assert_allclose(masked, divergence(student, teacher), rtol=1e-5)


def test_infinite_where_the_support_is_missing():
    short, full = np.float32([[0.0, 1.0, -np.inf], [1.0, 0.0, 2.0]])
    assert np.isinf(kl_divergence(short, full))
    assert np.isinf(reverse_kl(full, short))
    assert np.isfinite(kl_divergence(full, short))
    assert np.isfinite(reverse_kl(short, full))
    np.testing.assert_allclose(
        generalized_jensen_shannon(*np.float32([[0.0, -np.inf], [-np.inf, 0.0]])),
        np.log(2),
        rtol=1e-6,
    )


def test_traced_temperature():
    student, teacher = pair()

    def loss(temperature):
        return kl_divergence(student, teacher, temperature=temperature)

    np.testing.assert_allclose(jax.jit(loss)(2.0), loss(2.0), rtol=1e-5)


def test_errors_name_the_culprit():
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"got \(3, 10\); across vocabularies use universal_"):
        losses.kl_divergence(student, teacher[:, :10])
    with pytest.raises(ValueError, match=r"teacher_logits: expected .* \(3, 11\), got \(2, 11\)$"):
        losses.kl_divergence(student, teacher[:2])
    with pytest.raises(ValueError, match=r"temperature: expected a positive number, got 0\.0"):
        losses.kl_divergence(student, teacher, temperature=0.0)
    with pytest.raises(ValueError, match=r"beta: expected a number from 0 to 1, got 1\.5"):
        losses.generalized_jensen_shannon(student, teacher, beta=1.5)
    with pytest.raises((TypeError, ValueError), match="direction"):
        losses.kl_divergence(student, teacher, direction="sideways")
    with pytest.raises(
        ValueError, match=r"vocab_where: expected a shape that broadcasts .* got \(10,\)"
    ):
        losses.kl_divergence(student, teacher, vocab_where=np.ones(10, bool))
