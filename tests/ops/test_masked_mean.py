import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax import ops
from tests._compiled import compiled

masked_mean = compiled(ops.masked_mean)
with_gradient = jax.jit(jax.value_and_grad(ops.masked_mean))


def test_mean_of_all():
    assert masked_mean(np.array([1.0, 2.0, 6.0], np.float32)) == 3.0


def test_neither_value_nor_gradient_sees_the_rest():
    values = np.float32([[1.0, np.nan], [np.inf, 3.0]])
    where = np.array([[True, False], [False, True]])
    value, grad = with_gradient(values, where)
    assert value == 2.0
    np.testing.assert_array_equal(grad, [[0.5, 0.0], [0.0, 0.5]])


def test_empty_mask_is_zero():
    value, grad = with_gradient(np.ones(3, np.float32), np.zeros(3, bool))
    assert value == 0.0
    np.testing.assert_array_equal(grad, np.zeros(3))


def test_mask_broadcasts():
    assert masked_mean(np.float32([[1.0, 2.0], [3.0, 4.0]]), np.array([[True], [False]])) == 1.5


def test_bfloat16_is_averaged_in_float32():
    result = masked_mean(np.ones(1000, jnp.bfloat16))
    assert result.dtype == jnp.float32
    assert result == 1.0


def test_errors():
    with pytest.raises(TypeError):
        masked_mean(np.ones(3, np.float32), np.ones(3, np.float32))
    with pytest.raises(
        ValueError, match=r"where: expected a shape that broadcasts to \(3,\), got \(2,\)"
    ):
        masked_mean(np.ones(3, np.float32), np.ones(2, bool))
