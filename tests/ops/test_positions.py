"""Positions that count, gathered and put back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitjax.ops import Positions
from tests._compiled import compiled

VALUES = np.arange(24, dtype=np.float32).reshape(2, 4, 3) + 1
WHERE = np.array([[False, True, True, False], [True, False, False, False]])


@pytest.mark.parametrize("most", [3, 5, 8, 9, None])
def test_what_counts_is_there_and_comes_back(most):
    picked, counted, fits, back = round_trip(most, WHERE, VALUES)
    np.testing.assert_array_equal(picked[counted], VALUES[WHERE])
    assert fits
    np.testing.assert_array_equal(back, np.where(WHERE[..., None], VALUES, 0))


@compiled
def _round_trip(most, where, values):
    positions = Positions(where, most)
    picked = positions.pick(values)
    counted = jnp.expand_dims(positions.counted, tuple(range(positions.counted.ndim, picked.ndim)))
    back = positions.put(jnp.where(counted, picked, 0))
    return picked, positions.counted, positions.fits, back


def round_trip(most, where, values):
    """The picked values, which of them count, whether they fit, and those that come back."""
    return jax.device_get(_round_trip(most, where, values))


def test_too_many_are_noticed():
    picked, _, fits, _ = round_trip(2, WHERE, VALUES)
    assert not fits
    np.testing.assert_array_equal(picked, VALUES[0, 1:3])


def test_nothing_that_counts():
    _, counted, fits, back = round_trip(3, np.zeros((2, 4), bool), VALUES)
    assert fits
    assert not counted.any()
    np.testing.assert_array_equal(back, np.zeros_like(VALUES))


@given(st.lists(st.booleans(), min_size=12, max_size=12), st.sampled_from([1, 2, 6, 12, 13]))
def test_one_program_for_all_masks(where, most):
    where = np.array(where).reshape(3, 4)
    _, _, fits, back = round_trip(most, where, NUMBERS)
    assert bool(fits) == (where.sum() <= most)
    first = where.ravel().cumsum().reshape(where.shape) <= most
    np.testing.assert_array_equal(np.where(where & first, NUMBERS, 0), back)


NUMBERS = np.arange(12, dtype=np.float32).reshape(3, 4) + 1


def test_gradients_reach_what_counts_alone():
    def loss(values):
        positions = Positions(WHERE, 5)
        squares = (positions.pick(values) ** 2).sum(axis=-1)
        return jnp.where(positions.counted, squares, 0).sum()

    np.testing.assert_array_equal(
        jax.jit(jax.grad(loss))(VALUES), np.where(WHERE[..., None], 2 * VALUES, 0)
    )


def test_no_places_at_all_is_an_error():
    with pytest.raises(ValueError, match="most: expected a positive number, got 0"):
        Positions(WHERE, 0)
