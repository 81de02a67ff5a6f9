"""Positions that count, gathered and put back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitjax.ops import Positions

VALUES = np.arange(24, dtype=np.float32).reshape(2, 4, 3) + 1
WHERE = np.array([[False, True, True, False], [True, False, False, False]])


@pytest.mark.parametrize("most", [3, 5, 8, 9, None])
def test_what_counts_is_there_and_comes_back(most):
    positions = Positions(WHERE, most)
    picked = np.asarray(positions.pick(VALUES))
    np.testing.assert_array_equal(picked[np.asarray(positions.counted)], VALUES[WHERE])
    assert bool(positions.fits)
    back = np.asarray(positions.put(np.where(np.asarray(positions.counted)[..., None], picked, 0)))
    np.testing.assert_array_equal(back, np.where(WHERE[..., None], VALUES, 0))


def test_too_many_are_noticed():
    positions = Positions(WHERE, 2)
    assert not bool(positions.fits)
    np.testing.assert_array_equal(positions.pick(VALUES), VALUES[0, 1:3])


def test_nothing_that_counts():
    positions = Positions(np.zeros((2, 4), bool), 3)
    assert bool(positions.fits)
    assert not np.asarray(positions.counted).any()
    np.testing.assert_array_equal(positions.put(positions.pick(VALUES)), np.zeros_like(VALUES))


@given(st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 13))
def test_one_program_for_all_masks(where, most):
    where = np.array(where).reshape(3, 4)
    fits, back = ROUND_TRIP[most](where)
    assert bool(fits) == (where.sum() <= most)
    first = where.ravel().cumsum().reshape(where.shape) <= most
    np.testing.assert_array_equal(np.where(where & first, NUMBERS, 0), back)


NUMBERS = np.arange(12, dtype=np.float32).reshape(3, 4) + 1


def _round_trip(most):
    @jax.jit
    def there_and_back(where):
        positions = Positions(where, most)
        kept = jnp.where(positions.counted, positions.pick(NUMBERS), 0)
        return positions.fits, positions.put(kept)

    return there_and_back


ROUND_TRIP = {most: _round_trip(most) for most in range(1, 14)}


def test_gradients_reach_what_counts_alone():
    def loss(values):
        positions = Positions(WHERE, 5)
        squares = (positions.pick(values) ** 2).sum(axis=-1)
        return jnp.where(positions.counted, squares, 0).sum()

    np.testing.assert_array_equal(jax.grad(loss)(VALUES), np.where(WHERE[..., None], 2 * VALUES, 0))


def test_no_places_at_all_is_an_error():
    with pytest.raises(ValueError, match="most: expected a positive number, got 0"):
        Positions(WHERE, 0)
