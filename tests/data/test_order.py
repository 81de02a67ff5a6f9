import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitjax.data._order import global_indices, permute, process_rows


@given(length=st.integers(1, 300), seed=st.integers(-(2**40), 2**70), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(length, seed, epoch):
    rows = permute(np.arange(length), length=length, seed=seed, epoch=epoch)
    np.testing.assert_array_equal(np.sort(rows), np.arange(length))


def test_positions_are_permuted_independently():
    whole = permute(np.arange(1000), length=1000, seed=3, epoch=2)
    some = np.asarray([999, 0, 17])
    np.testing.assert_array_equal(permute(some, length=1000, seed=3, epoch=2), whole[some])


def test_seeds_and_epochs_give_different_orders_that_look_random():
    orders = [
        permute(np.arange(4096), length=4096, seed=seed, epoch=epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    places = np.arange(4096)
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(order, places)[0, 1]) < 0.06
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06
        assert 0 <= (order == places).sum() < 8
        for other in orders[:i]:
            assert (order == other).sum() < 8


def test_the_order_never_changes():
    # Runs that were interrupted before an upgrade must go on with the same rows.
    rows = permute(np.arange(10), length=10, seed=42, epoch=1)
    assert rows.tolist() == [1, 2, 7, 6, 0, 4, 8, 5, 9, 3]


def test_batches_cover_epochs_and_straddle_them():
    rows = np.concatenate(
        [global_indices(step, length=7, seed=5, batch_size=3) for step in range(7)]
    )
    for epoch in rows.reshape(3, 7):
        assert sorted(epoch) == list(range(7))


def test_a_batch_may_be_larger_than_the_data():
    rows = global_indices(1, length=3, seed=0, batch_size=8)
    assert set(rows) == {0, 1, 2}


def test_large_data_needs_no_table():
    rows = global_indices(10**9, length=10**12 + 7, seed=0, batch_size=64)
    assert len(set(rows.tolist())) == 64
    assert rows.max() > 10**11


@pytest.mark.parametrize(("index", "count"), [(0, 3), (4, 4), (-1, 4)])
def test_impossible_shares_of_a_batch(index, count):
    with pytest.raises(ValueError, match="process_"):
        process_rows(8, index, count)
