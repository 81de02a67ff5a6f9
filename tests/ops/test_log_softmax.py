import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from logitjax import ops
from tests._compiled import compiled, values_and_gradient

log_softmax, logsumexp = compiled(ops.log_softmax), compiled(ops.logsumexp)


def oracle(logits):
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1, keepdims=True)
    return np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]


def test_values():
    logits = np.random.default_rng(0).normal(size=(3, 17)).astype(np.float32) * 5
    np.testing.assert_allclose(logsumexp(logits), oracle(logits), rtol=1e-6)
    expected = logits - oracle(logits)[:, None]
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logsumexp(logits.T, axis=0), oracle(logits), rtol=1e-6)


@jax.jit
def values_and_grads(logits):
    grads = [
        jax.grad(lambda v: logsumexp(v)[0])(logits),
        jax.grad(lambda v: jnp.exp(log_softmax(v)).sum())(logits),
    ]
    return (logsumexp(logits), log_softmax(logits)), grads


@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        np.float32, (2, 5), elements=st.floats(-1e4, 1e4, width=32) | st.just(-np.inf)
    )
)
def test_never_nan(logits):
    values, grads = values_and_grads(logits)
    assert not any(np.isnan(value).any() for value in values)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_empty_row_has_zero_gradient():
    logits = np.full((2, 3), -np.inf, np.float32)
    values, gradient = values_and_gradient(ops.logsumexp)(logits)
    np.testing.assert_array_equal(values, [-np.inf, -np.inf])
    np.testing.assert_array_equal(log_softmax(logits), logits)
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_where_is_minus_infinity():
    logits = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    where = np.array([True, True, False, True, False, True])
    padded = np.where(where, logits, -np.inf)
    np.testing.assert_array_equal(log_softmax(logits, vocab_where=where), log_softmax(padded))
    _, grad = values_and_gradient(ops.logsumexp)(logits, vocab_where=where)
    assert (np.asarray(grad)[:, ~where] == 0).all()
    np.testing.assert_allclose(np.asarray(grad).sum(-1), 1.0, rtol=1e-6)


def test_bfloat16_is_summed_in_float32():
    logits = np.zeros(4096, jnp.bfloat16)
    result = logsumexp(logits)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, np.log(4096), rtol=1e-6)


def test_first_and_second_derivative():
    logits = np.float32([0.3, -1.0, 2.0])
    probs = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(jax.jit(jax.jacfwd(ops.logsumexp))(logits), probs, rtol=1e-6)
    hessian = jax.jit(jax.hessian(ops.logsumexp))(logits)
    np.testing.assert_allclose(hessian, np.diag(probs) - np.outer(probs, probs), atol=1e-6)


def test_vocabulary_sharded_equals_local():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    logits = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    logits[0, 5:] = -np.inf  # whole shards without an entry
    logits[1] = -np.inf
    weights = np.random.default_rng(1).normal(size=(4, 40)).astype(np.float32)

    def total(log_probs, w):
        return jnp.where(log_probs > -jnp.inf, w * log_probs, 0.0).sum(-1)

    def shard(v, w):
        return jax.lax.psum(total(log_softmax(v, axis_name="model"), w), "model")

    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(P(None, "model"),) * 2, out_specs=P())

    def local(v, w):
        return total(log_softmax(v), w)

    sharded_values, expected = (jax.jit(f)(logits, weights) for f in (sharded, local))
    np.testing.assert_allclose(sharded_values, expected, rtol=1e-5)
    grads = [
        jax.jit(jax.grad(lambda v, f=f: f(v, weights).sum()))(logits) for f in (sharded, local)
    ]
    np.testing.assert_allclose(*grads, rtol=1e-5, atol=1e-6)


def test_errors_name_the_culprit():
    with pytest.raises(TypeError):
        logsumexp(np.arange(3))
    with pytest.raises(ValueError, match="axis: expected one of the 2 axes of logits, got 2"):
        logsumexp(np.zeros((2, 3), np.float32), axis=2)
    with pytest.raises(
        ValueError, match=r"vocab_where: expected a shape that broadcasts to \(2, 3\), got \(2,\)"
    ):
        logsumexp(np.zeros((2, 3), np.float32), vocab_where=np.ones(2, bool))
    with pytest.raises(ValueError, match=r"vocab_where: expected a shape .* got \(4, 2, 3\)"):
        logsumexp(np.zeros((2, 3), np.float32), vocab_where=np.ones((4, 2, 3), bool))
