"""The rule that chooses without a retrained model: two-sided, and never a product of scores."""

import math

import numpy as np
import pytest

from logitjax.unlearning import share_interval
from logitjax.unlearning._selection import (
    Goal,
    Limits,
    least_share,
    matched_strength,
    pareto,
    strength_on_curve,
)
from logitjax.unlearning.measures._membership import min_k


def test_a_goal_is_missed_on_both_sides():
    goal = Goal.of(np.linspace(0.1, 0.3, 21), "unseen answers")
    assert goal.probability == pytest.approx(0.2)
    assert goal.met(0.2)
    assert goal.met(0.39)
    assert not goal.met(0.41)
    assert not goal.met(0.105)  # within a factor of 2, but below the 5 % point
    assert goal.gap(0.1) == pytest.approx(math.log(2))


@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_the_strength_that_meets_it_is_found(rate):
    goal, tried = Goal.of([0.2], ""), []

    def probability(strength):
        tried.append(strength)
        return 0.99 * math.exp(-rate * strength)

    strength, found = matched_strength(probability, goal, most=4.0)
    assert goal.gap(found) <= 0.5
    assert found == pytest.approx(0.99 * math.exp(-rate * strength))
    assert len(tried) == len(set(tried)) <= 8


@pytest.mark.parametrize("unseen", [[0.2], [0.2, 0.2, 0.21], np.linspace(0.19, 0.23, 40)])
def test_what_is_found_meets_a_goal_whose_floor_is_near(unseen):
    goal, rng = Goal.of(unseen, ""), np.random.default_rng(0)
    for rate in rng.uniform(0.5, 8.0, 40):
        _, found = matched_strength(lambda s, rate=rate: 0.99 * math.exp(-rate * s), goal, most=4.0)
        assert goal.met(found)
        alphas = 4.0 * np.linspace(0.0, 1.0, 31)[1:] ** 2
        at = strength_on_curve(alphas, 0.99 * np.exp(-rate * alphas**1.5), goal)
        assert goal.met(0.99 * math.exp(-rate * at**1.5))


def test_nothing_left_is_no_missing_measurement():
    assert least_share({"probability": 0.97, "rouge": 0.0, "perplexity": 1.0}) == 0.0
    assert least_share({"probability": 0.97, "rouge": None, "perplexity": 1.25}) == 0.8
    assert least_share({}) == 0.0


def test_what_is_left_without_any_saves_trials():
    goal = Goal(probability=0.1, floor=0.01, source="")
    # An update that forgets all at once: the goal lies far below the middle.
    tried = {math.nan: [], 0.99: []}
    for without, strengths in tried.items():

        def probability(strength, strengths=strengths):
            strengths.append(strength)
            return 0.99 * math.exp(-20 * strength)

        strength, found = matched_strength(probability, goal, without=without)
        assert goal.gap(found) <= 0.25
        assert strength == strengths[-1]
    assert tried[0.99] == [0.5, pytest.approx(math.log(9.9) / 20)]
    assert len(tried[math.nan]) > 2


def test_what_is_below_the_goal_already_and_does_not_move_is_left_alone():
    strength, found = matched_strength(lambda s: 0.01, Goal.of([0.1], ""), without=0.01)
    assert 0 <= strength <= 1
    assert found == 0.01


def test_where_it_is_out_of_reach_the_strongest_is_the_nearest():
    assert matched_strength(lambda s: 0.9 - 0.1 * s, Goal.of([0.1], ""))[0] == 1.0
    strength, found = matched_strength(lambda s: math.nan, Goal.of([0.1], ""))
    assert strength == 0.0
    assert math.isnan(found)


def test_limits_are_broken_by_less_and_by_nan():
    limits = Limits()
    kept = {"probability": 0.98, "rouge": None, "fluency": 1.0, "perplexity": 1.02}
    assert limits.broken(kept) == ()
    assert limits.broken(kept | {"fluency": math.nan}) == ("fluency",)
    assert limits.broken(kept | {"perplexity": math.nan, "rouge": 0.5}) == ("rouge", "perplexity")


def test_equal_candidates_do_not_dominate_each_other():
    assert pareto([(1, 1), (1, 1), (0, 2), (0, 1)]) == [0, 1, 2]


def test_the_interval_of_a_share_holds_what_it_was_drawn_with():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(60):
        before = rng.uniform(0.5, 1.0, 30)
        after = 0.9 * before + rng.normal(0, 0.05, 30)
        share, low, high = share_interval(after, before, resamples=300, seed=seed)
        assert low <= share <= high
        held += low <= 0.9 <= high
    assert held >= 48


def test_min_k_of_all_tokens_is_the_loss():
    nll = np.array([0.1, 2.0, 0.7])
    assert min_k(nll, k=1.0) == pytest.approx(nll.mean())
    assert min_k(nll, k=0.1) == 2.0
    with pytest.raises(ValueError, match="k: expected a share"):
        min_k(nll, k=0.0)
    with pytest.raises(ValueError, match="nll: expected losses"):
        min_k([])
