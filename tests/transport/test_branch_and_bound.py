"""Branch and bound: brackets hold the optimum that trying all matchings finds, and meet."""

import itertools

import jax
import numpy as np
import pytest

from logitjax.transport import FactoredGraph, branch_and_bound


def gram(rng, n, rows=20):
    z = rng.normal(size=(rows, n))
    return z.T @ z


def test_the_optimum_of_all_matchings_is_proven():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5, 6):
        c, d = gram(rng, n), gram(rng, n)
        answer = branch_and_bound(c, d)
        costs = [
            np.square(c - d[np.ix_(order, order)]).mean()
            for order in map(list, itertools.permutations(range(n)))
        ]
        assert answer.lower <= min(costs) <= answer.upper <= (1 + 3e-6) * answer.lower
        order = answer.coupling.columns
        np.testing.assert_allclose(np.square(c - d[np.ix_(order, order)]).mean(), answer.upper)


def test_squared_distances_are_concave_too_and_units_do_not_matter():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(2, 6, 3))
    c, d = (np.square(x[:, None] - x).sum(-1) for x in points)
    plain = branch_and_bound(c, d)
    assert 0 < plain.lower <= plain.upper <= (1 + 3e-6) * plain.lower
    for scale in (1e-120, 1e120):
        scaled = branch_and_bound(scale * c, scale * d)
        np.testing.assert_allclose(scaled.upper / scale / scale, plain.upper, rtol=1e-9)
    order = rng.permutation(6)
    same = branch_and_bound(c, c[np.ix_(order, order)])
    assert same.lower == same.upper == 0


def test_what_time_did_not_allow_is_no_proof():
    rng = np.random.default_rng(2)
    c, d = gram(rng, 12), gram(rng, 12)
    short, long = (branch_and_bound(c, d, seconds=seconds) for seconds in (0.0, 60.0))
    assert 0 < short.lower < long.lower <= long.upper <= short.upper


@pytest.mark.parametrize(
    ("c", "d", "message"),
    [
        (np.eye(4)[::-1], np.eye(4), r"got an eigenvalue -?\d"),
        (np.eye(3), np.eye(4), "as many nodes"),
        (np.triu(np.ones((3, 3))), np.eye(3), "symmetric"),
        (np.full((3, 3), np.nan), np.eye(3), "finite"),
        (np.eye(513), np.eye(513), "1 to 512 nodes"),
    ],
)
def test_other_graphs_are_refused(c, d, message):
    with pytest.raises(ValueError, match=message):
        branch_and_bound(c, d)


def test_factored_graphs_are_their_matrices():
    rng = np.random.default_rng(3)
    z, w = rng.normal(size=(2, 8, 5)).astype(np.float32)
    answer = branch_and_bound(FactoredGraph(z), FactoredGraph(w))
    with jax.enable_x64(True):
        dense = branch_and_bound(*(np.float64(x).T @ np.float64(x) for x in (z, w)))
    np.testing.assert_allclose(answer.upper, dense.upper, rtol=1e-5)
