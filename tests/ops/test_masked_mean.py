import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.ops import masked_mean


def test_mean_of_all():
    assert masked_mean(np.array([1.0, 2.0, 6.0], np.float32)) == 3.0


def test_neither_value_nor_gradient_sees_the_rest():
    values = jnp.array([[1.0, jnp.nan], [jnp.inf, 3.0]])
    where = jnp.array([[True, False], [False, True]])
    value, grad = jax.value_and_grad(masked_mean)(values, where)
    assert value == 2.0
    np.testing.assert_array_equal(grad, [[0.5, 0.0], [0.0, 0.5]])


def test_empty_mask_is_zero():
    value, grad = jax.value_and_grad(masked_mean)(jnp.ones(3), jnp.zeros(3, bool))
    assert value == 0.0
    np.testing.assert_array_equal(grad, np.zeros(3))


def test_mask_broadcasts():
    assert masked_mean(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[True], [False]])) == 1.5


def test_bfloat16_is_averaged_in_float32():
    result = masked_mean(jnp.full(1000, 1.0, jnp.bfloat16))
    assert result.dtype == jnp.float32
    assert result == 1.0


def test_errors():
    with pytest.raises(TypeError):
        masked_mean(jnp.ones(3), jnp.ones(3))
    with pytest.raises(
        ValueError, match=r"where: expected a shape that broadcasts to \(3,\), got \(2,\)"
    ):
        masked_mean(jnp.ones(3), jnp.ones(2, bool))
