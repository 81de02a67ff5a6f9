"""Rotary frequencies by hand: with theta 10,000 and 8 dimensions they are powers of ten."""

import dataclasses
import math

import numpy as np
import pytest

from logitjax.models import DecoderConfig
from logitjax.models._config import RopeScaling
from logitjax.models._rope import rope_frequencies, rope_tables

CONFIG = DecoderConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    rope_theta=10_000.0,
)
PLAIN = np.array([1.0, 0.1, 0.01, 0.001])
# 2 pi times 1000, so that within it the pairs turn 1000, 100, 10 times and once.
LENGTH = 6283


def frequencies(window=None, long=False, config=CONFIG, **scaling):
    if scaling:
        scaling = RopeScaling(original_max_length=LENGTH, factor=4.0, **scaling)
        config = dataclasses.replace(config, rope_scaling=scaling)
    return rope_frequencies(config, window, long=long)


@pytest.mark.parametrize(
    ("scaling", "divisors", "amplitude"),
    [
        ({"kind": "linear"}, [4.0, 4.0, 4.0, 4.0], 1.0),
        # 10 turns lie 9/20 of the way from 1 to 21.
        (
            {"kind": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 21.0},
            [1.0, 1.0, 1 / (0.45 + 0.55 / 4), 4.0],
            1.0,
        ),
        # 32 turns fall between the second and the third pair and one on the fourth: from the
        # second on, the ramp is 0, 1/2, 1.
        ({"kind": "yarn"}, [1.0, 1.0, 1 / (0.5 + 0.5 / 4), 4.0], 0.1 * math.log(4) + 1),
        # A single turn in 1e8 tokens is beyond all pairs: the ramp ends at dimension 7.
        (
            {"kind": "yarn", "beta_fast": 1000.0, "beta_slow": 1e-5},
            [1 / (1 - k / 7 + k / 28) for k in range(4)],
            0.1 * math.log(4) + 1,
        ),
    ],
)
def test_scaled_frequencies_by_hand(scaling, divisors, amplitude):
    inverse, factor = frequencies(**scaling)
    np.testing.assert_allclose(inverse, PLAIN / divisors, rtol=1e-3)
    np.testing.assert_allclose(factor, amplitude)


def test_long_factors_begin_beyond_the_original_length():
    factors = {"kind": "longrope", "short_factors": (1.0,) * 4, "long_factors": (2.0,) * 4}
    for long, divisor in ((False, 1.0), (True, 2.0)):
        inverse, amplitude = frequencies(long=long, **factors)
        np.testing.assert_allclose(inverse, PLAIN / divisor)
        np.testing.assert_allclose(amplitude, math.sqrt(1 + math.log(4) / math.log(LENGTH)))
    scaling = RopeScaling(original_max_length=10, factor=1.0, **factors)
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    # Each row by its own length; 10 is not beyond.
    cos, _ = rope_tables(config, None, np.full((2, 1), 3), np.array([10, 11]))
    np.testing.assert_allclose(cos[:, 0], np.cos([3 * PLAIN, 1.5 * PLAIN]), rtol=1e-6)


def test_yarn_between_fractions_of_pairs():
    """With theta 10,000 pair ``i`` turns ``1000 / 10**i`` times: the ramp ends where it says."""
    inverse, _ = frequencies(kind="yarn", truncate=False, beta_fast=10**1.5, beta_slow=10**0.5)
    # From 1.5 to 2.5: the third pair lies in the middle.
    np.testing.assert_allclose(inverse, PLAIN / [1.0, 1.0, 1 / (0.5 + 0.5 / 4), 4.0], rtol=1e-3)


def test_a_layer_with_a_window_turns_by_its_own_base_where_there_is_one():
    local = dataclasses.replace(CONFIG, rope_local_theta=16.0)
    np.testing.assert_allclose(frequencies(config=local, kind="linear")[0], PLAIN / 4)
    np.testing.assert_allclose(
        frequencies(3, config=local, kind="linear")[0], [1.0, 0.5, 0.25, 0.125]
    )
    np.testing.assert_allclose(frequencies(3, kind="linear")[0], PLAIN / 4)
