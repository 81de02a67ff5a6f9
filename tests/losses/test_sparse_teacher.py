"""Losses against a teacher of which only the top logits are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax import losses, ops

BATCH, LENGTH, HIDDEN, VOCAB, K = 2, 7, 8, 150, 12
BLOCKS = dict(block_size=64, token_block=3)


def _normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape, scale=scale), jnp.float32)


X, W, B = _normal(0, BATCH, LENGTH, HIDDEN), _normal(1, VOCAB, HIDDEN), _normal(2, VOCAB)
TEACHER_LOGITS = _normal(3, BATCH, LENGTH, VOCAB, scale=3.0)
TEACHER = ops.top_k_of(TEACHER_LOGITS, K)
LABELS = jnp.asarray(np.random.default_rng(4).integers(0, VOCAB, (BATCH, LENGTH)))
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
    got = losses.sparse_kl_divergence(logits, TEACHER, direction=direction)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    full = losses.kl_divergence(logits, TEACHER_LOGITS, direction=direction)
    assert (got <= full * (1 + 1e-5)).all()


def test_all_entries_kept_give_the_full_divergence():
    logits = X @ W.T
    teacher = ops.top_k_of(TEACHER_LOGITS, VOCAB)
    want = losses.kl_divergence(logits, TEACHER_LOGITS)
    np.testing.assert_allclose(losses.sparse_kl_divergence(logits, teacher), want, atol=1e-5)


def test_zero_with_zero_gradient_where_the_student_agrees():
    value, gradient = jax.value_and_grad(lambda z: losses.sparse_kl_divergence(z, TEACHER).sum())(
        TEACHER_LOGITS
    )
    assert abs(value) < 1e-5
    assert np.abs(gradient).max() < 1e-5


def test_renormalised_tail_takes_a_temperature():
    logits = X @ W.T
    at_top = jnp.take_along_axis(logits, TEACHER.indices, -1)
    want = losses.kl_divergence(at_top, TEACHER.values, temperature=2.0)
    got = losses.sparse_kl_divergence(logits, TEACHER, tail="renormalize", temperature=2.0)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    linear = losses.linear_sparse_kl_divergence(
        X, W, TEACHER, tail="renormalize", temperature=2.0, **BLOCKS
    )
    np.testing.assert_allclose(linear, want, rtol=1e-5)
    with pytest.raises(ValueError, match="temperature must be 1 with tail='bucket'"):
        losses.sparse_kl_divergence(logits, TEACHER, temperature=2.0)


def _dense(x, w, b):
    logits = x @ w.T + b
    values = losses.sparse_kl_divergence(logits, TEACHER)
    return jnp.sum(WEIGHTS * (values + 0.3 * losses.cross_entropy(logits, LABELS)))


def _unreduced(x, w, b):
    values = losses.linear_sparse_kl_divergence(
        x, w, TEACHER, bias=b, labels=LABELS, cross_entropy_weight=0.3, **BLOCKS
    )
    return jnp.sum(WEIGHTS * values)


def _scalar(x, w, b):
    return losses.linear_sparse_kl_divergence(
        x,
        w,
        TEACHER,
        bias=b,
        labels=LABELS,
        cross_entropy_weight=0.3,
        token_weights=WEIGHTS,
        **BLOCKS,
    )


def _fused(x, w, b):
    def loss(readout, teacher):
        student = readout.gathered_top_k(teacher.indices)
        return losses.sparse_kl_divergence(student, teacher) + 0.3 * readout.cross_entropy

    return losses.linear_fused_loss(
        x, w, loss, TEACHER, WEIGHTS, bias=b, labels=LABELS, ids=TEACHER.indices, **BLOCKS
    )[0]


@functools.cache
def _expected():
    return jax.jit(jax.value_and_grad(_dense, (0, 1, 2)))(X, W, B)


@pytest.mark.parametrize("form", [_unreduced, _scalar, _fused])
def test_linear_forms_equal_dense(form):
    value, gradients = jax.jit(jax.value_and_grad(form, (0, 1, 2)))(X, W, B)
    want, want_gradients = _expected()
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, expected in zip(gradients, want_gradients, strict=True):
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_fused_loss_returns_what_metrics_need():
    def loss(readout, _):
        return jnp.square(readout.log_z)

    value, readout = losses.linear_fused_loss(
        X, W, loss, (), WEIGHTS, labels=LABELS, top_k=3, **BLOCKS
    )
    want = losses.linear_readout(X, W, labels=LABELS, top_k=3, **BLOCKS)
    np.testing.assert_allclose(value, (WEIGHTS * want.log_z**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(readout.cross_entropy, want.cross_entropy, rtol=1e-5)
    np.testing.assert_array_equal(readout.statistics.indices, want.statistics.indices)


def test_a_vocabulary_smaller_than_k_pads_with_minus_infinity():
    teacher = ops.TopK(
        values=TEACHER.values.at[..., -2:].set(-jnp.inf),
        indices=TEACHER.indices,
        log_z=TEACHER.log_z,
    )
    value, gradient = jax.value_and_grad(lambda z: losses.sparse_kl_divergence(z, teacher).sum())(
        TEACHER_LOGITS
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_missing_labels_are_named():
    with pytest.raises(ValueError, match="labels: needed with cross_entropy_weight"):
        losses.linear_sparse_kl_divergence(X, W, TEACHER, cross_entropy_weight=0.5)
