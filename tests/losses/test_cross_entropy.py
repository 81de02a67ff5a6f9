import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import numpy as np
import optax
import pytest

from logitjax import losses
from logitjax.ops import masked_mean
from tests._compiled import compiled

cross_entropy = compiled(losses.cross_entropy)


def batch(shape=(2, 3, 11)):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=shape) * 3).astype(np.float32)
    return logits, rng.integers(shape[-1], size=shape[:-1])


def oracle(logits, labels, label_smoothing=0.0, z_loss=0.0):
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    label = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    finite = np.where(np.isfinite(logits), logits, np.nan)
    uniform = log_z - np.nanmean(finite, -1)
    nll = (1 - label_smoothing) * (log_z - label) + label_smoothing * uniform
    return nll + z_loss * log_z**2


def test_by_hand():
    logits, label = np.log(np.float32([0.5, 0.25, 0.25])), np.array(1)
    np.testing.assert_allclose(cross_entropy(logits, label), np.log(4), rtol=1e-6)
    # Half of ln 4, half of the mean of ln 2, ln 4 and ln 4.
    smoothed = cross_entropy(logits, label, label_smoothing=0.5)
    np.testing.assert_allclose(smoothed, (2 / 2 + 5 / 6) * np.log(2), rtol=1e-6)
    # log Z of the logits plus ln 8 is ln 8.
    shifted = cross_entropy(logits + np.float32(np.log(8)), label, z_loss=0.1)
    np.testing.assert_allclose(shifted, np.log(4) + 0.1 * np.log(8) ** 2, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
def test_float64_oracle(options):
    logits, labels = batch()
    expected = oracle(logits, labels, **options)
    np.testing.assert_allclose(cross_entropy(logits, labels, **options), expected, rtol=1e-5)


def test_equals_optax():
    logits, labels = batch()
    expected = jax.jit(optax.softmax_cross_entropy_with_integer_labels)(logits, labels)
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-5)


def test_tokens_that_a_mask_leaves_out_count_for_nothing():
    logits, labels = batch()
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    garbage = np.pad(logits, ((0, 0), (0, 0), (0, 5)), constant_values=7.0)
    masked = cross_entropy(garbage, labels, vocab_where=np.arange(16) < 11, **options)
    np.testing.assert_allclose(masked, cross_entropy(logits, labels, **options), rtol=1e-6)


@jax.jit
@jax.value_and_grad
def value_and_grad(logits):
    labels = np.array([0, 1, 3])
    return cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-4).sum()


@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        np.float32, (3, 4), elements=st.floats(-1e4, 1e4, width=32) | st.just(-np.inf)
    )
)
def test_never_nan(logits):
    value, grad = value_and_grad(logits)
    assert not np.isnan(value)
    assert np.isfinite(grad).all()


def test_without_a_z_loss_large_logits_have_a_finite_loss():
    np.testing.assert_allclose(cross_entropy(np.float32([[1e30, 0.0]]), np.array([1])), 1e30)


def test_labels_outside_show_and_are_masked_out():
    logits, _ = batch((4, 5))
    labels = np.array([2, -100, 5, 4])
    loss = np.asarray(cross_entropy(logits, labels))
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True, False])

    def mean(logits):
        inside = (labels >= 0) & (labels < 5)
        return masked_mean(cross_entropy(logits, labels), inside)

    value, grad = jax.jit(jax.value_and_grad(mean))(logits)
    np.testing.assert_allclose(value, loss[np.array([0, 3])].mean(), rtol=1e-6)
    assert (np.asarray(grad)[1:3] == 0).all()
    assert np.isfinite(grad).all()


def test_traced_options():
    logits, labels = batch()

    def loss(smoothing, z_loss):
        return cross_entropy(logits, labels, label_smoothing=smoothing, z_loss=z_loss)

    np.testing.assert_allclose(jax.jit(loss)(0.1, 1e-3), loss(0.1, 1e-3), rtol=1e-6)


def test_errors_name_the_culprit():
    logits, labels = batch()
    with pytest.raises(TypeError):
        losses.cross_entropy(logits, labels.astype(np.float32))
    with pytest.raises(ValueError, match=r"labels: expected the shape .*\(2, 3\), got \(2, 2\)"):
        losses.cross_entropy(logits, labels[:, :2])
    with pytest.raises(
        ValueError, match=r"label_smoothing: expected a number in \[0, 1\), got 1.0"
    ):
        losses.cross_entropy(logits, labels, label_smoothing=1.0)
