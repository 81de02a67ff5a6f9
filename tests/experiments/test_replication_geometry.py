"""Likeness of hidden states, each measure beside its null."""

import numpy as np
import pytest

from experiments.replication.geometry import compare_geometry


def test_rotated_states_are_the_same_and_unrelated_ones_are_not():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((300, 20)) + 3.0
    turn, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    same = compare_geometry(states, 2.0 * states @ turn + 1.0)
    assert same["procrustes_r2"] == pytest.approx(1.0)
    assert same["cka"] == pytest.approx(1.0)
    null = compare_geometry(states, 2.0 * states @ turn + 1.0, paired=False)
    assert null["procrustes_r2"] < 0.1
    assert null["cka"] < 0.2


def test_a_shared_mean_makes_unrelated_states_look_alike_without_centring():
    rng = np.random.default_rng(1)
    mean = 5 * rng.standard_normal(16)
    a, b = (rng.standard_normal((200, 16)) + mean for _ in range(2))
    geometry = compare_geometry(a, b)
    assert geometry["raw_cosine"] > 0.8
    assert geometry["procrustes_r2"] < 0.1


def test_widths_may_differ():
    rng = np.random.default_rng(2)
    wide = rng.standard_normal((200, 12))
    geometry = compare_geometry(wide[:, :5], wide)
    assert 0.2 < geometry["procrustes_r2"] < 0.6
    assert np.isnan(geometry["raw_cosine"])
