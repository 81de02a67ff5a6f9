"""The rule that chooses without a retrained model: two-sided, and never a product of scores."""

import math

import numpy as np
import pytest

from logitjax.unlearning import share_interval
from logitjax.unlearning._selection import (
    Goal,
    Limits,
    kept_shares,
    least_kind,
    least_row,
    least_share,
    matched_strength,
)
from logitjax.unlearning.measures._membership import min_k


def goal_of(*unseen):
    return Goal.of({"asked": unseen}, "unseen answers")


def test_the_goal_is_of_the_worst_row_in_any_way_and_not_of_a_median():
    goal = Goal.of({"asked": [0.01, 0.03, 0.02], "in a role": [0.05, 0.01]}, "unseen answers")
    rows = {"asked": [0.03] * 79 + [0.2], "in a role": [0.05]}
    assert goal.excess(rows) == pytest.approx({"asked": 0.2 / 0.03, "in a role": 1.0})
    assert goal.limit("in a role") == pytest.approx(0.1)
    assert goal.limit("a way that nobody was asked in") == goal.limit("asked")
    # A control that says nothing at all does not make a thousandth an answer that is said.
    assert goal_of(1e-9).limit("asked") == pytest.approx(0.005)
    # Nor does one that says all excuse an answer that is more likely said than not.
    assert goal_of(0.9).limit("asked") == 0.5
    assert goal.gap(1.4) == 0.0
    assert math.isfinite(goal.gap(0.0))
    assert goal.met(2.0)
    assert not goal.met(2.01)
    assert not goal.met(math.nan)
    assert goal.gap(2.0 * goal.aim) == pytest.approx(math.log(2))


@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_the_strength_that_meets_it_is_found(rate):
    goal, tried = goal_of(0.2), []

    def excess(strength):
        tried.append(strength)
        return 5 * math.exp(-rate * strength)

    strength, excess_left = matched_strength(excess, goal, most=4.0)
    assert goal.gap(excess_left) <= 0.25
    assert excess_left == pytest.approx(5 * math.exp(-rate * strength))
    assert len(tried) == len(set(tried)) <= 8
    assert tried[0] == 1.0


def test_nothing_left_is_no_missing_measurement():
    assert least_share({"probability": 0.97, "rouge": 0.0, "perplexity": 1.0}) == 0.0
    assert least_share({"probability": 0.97, "rouge": None, "perplexity": 1.25}) == 0.8
    assert least_share({}) == 0.0


def test_what_is_left_without_any_saves_trials():
    goal = goal_of(0.1)
    # An update that forgets all at once: the goal lies far below the middle.
    tried = {math.nan: [], 9.9: []}
    for without, strengths in tried.items():

        def excess(strength, strengths=strengths):
            strengths.append(strength)
            return 9.9 * math.exp(-20 * strength)

        strength, excess_left = matched_strength(excess, goal, without=without)
        assert goal.gap(excess_left) <= 0.25
        assert strength == strengths[-1]
    assert tried[9.9] == [0.5, pytest.approx(math.log(9.9 / goal.aim) / 20)]
    assert len(tried[math.nan]) > 2
    assert tried[math.nan][:2] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("without", "left", "second"), [(2.0, 1e-9, 0.05), (1e9, 1.0, 0.45)], ids=["near", "far"]
)
def test_a_trial_is_a_tenth_or_more_from_both_ends(without, left, second):
    tried = []
    matched_strength(lambda s: tried.append(s) or left, goal_of(0.1), without=without, trials=2)
    assert tried == [0.5, pytest.approx(second)]


def test_trials_end_within_the_tolerance_or_with_the_best_that_the_goal_allows():
    goal, tried = goal_of(0.1), []
    _, found = matched_strength(lambda s: goal.aim * math.exp(0.3 - 1.2 * s), goal)
    assert goal.gap(found) <= 0.25
    matched_strength(lambda s: tried.append(s) or 1.6, goal, tolerance=goal.gap(1.6))
    assert tried == [0.5]
    # A jump over the goal: what is just above it is nearer, but too much.
    strength, found = matched_strength(lambda s: tried.append(s) or (2.1 if s < 0.7 else 0.5), goal)
    assert found == 0.5
    assert strength >= 0.7
    assert len(tried) == 1 + 8


def test_what_is_below_the_goal_already_and_does_not_move_is_left_alone():
    strength, excess_left = matched_strength(lambda s: 0.1, goal_of(0.1), without=0.1)
    assert 0 <= strength <= 1
    assert excess_left == 0.1


def test_where_it_is_out_of_reach_the_strongest_is_the_nearest():
    assert matched_strength(lambda s: 9 - s, goal_of(0.1))[0] == 1.0
    strength, excess_left = matched_strength(lambda s: math.nan, goal_of(0.1))
    assert strength == 0.0
    assert math.isnan(excess_left)


def test_limits_are_broken_by_less_and_by_nan():
    limits = Limits()
    kept = {"probability": 0.97, "rouge": None, "fluency": 1.0, "perplexity": 1.02}
    assert limits.broken(kept | {"row": 0.9, "rouge": 0.97, "fluency": 0.95}) == ()
    assert limits.broken(kept | {"fluency": math.nan}) == ("fluency",)
    assert limits.broken(kept | {"perplexity": math.nan, "rouge": 0.5}) == ("rouge", "perplexity")


def test_a_kind_and_a_row_count_by_themselves():
    before, kinds = [0.9, 0.9, 0.9, 0.01], ["near", "other", "other", "other"]
    after = [0.6, 0.9, 0.9, 0.001]
    assert kept_shares(after, before, kinds)["near"] == pytest.approx(2 / 3)
    assert kept_shares(after, before, kinds)["other"] > 0.99
    # What was not known has nothing to lose.
    assert least_row(after, before) == pytest.approx(2 / 3)
    assert least_row([0.1], [0.2]) is None
    assert least_row([0.1], [0.5]) == pytest.approx(0.2)
    assert least_kind({"near": 0.9, "unknown": 0.1}) == 0.9
    assert least_kind({"unknown": 0.1}) == 0.1


def test_what_is_chosen_has_half_of_the_room():
    half = Limits(probability=0.9, row=0.0, perplexity=1.1).halved()
    assert (half.probability, half.row) == (pytest.approx(0.95), 0.0)
    assert half.perplexity == pytest.approx(1.05)


def test_the_interval_of_a_share_holds_what_it_was_drawn_with():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        before = rng.uniform(0.5, 1.0, 30)
        after = 0.9 * before + rng.normal(0, 0.05, 30)
        share, low, high = share_interval(after, before, resamples=300, seed=seed)
        assert low <= share <= high
        covered += low <= 0.9 <= high
    assert covered >= 48
    _, low, high = share_interval(after, before, confidence=0.5)
    assert low < high
    # Of many rows it is the normal one.
    share, low, high = share_interval(np.arange(1000) % 2, np.ones(1000))
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(share * (1 - share) / 1000), rel=0.07)
    # Nothing before leaves a ratio that is a number.
    assert np.isfinite(share_interval([1.0], [0.0])).all()


def test_min_k_of_all_tokens_is_the_loss():
    nll = np.array([0.1, 2.0, 0.7])
    assert min_k(nll, k=1.0) == pytest.approx(nll.mean())
    assert min_k(nll, k=0.1) == 2.0
    with pytest.raises(ValueError, match="k: expected a share"):
        min_k(nll, k=0.0)
    with pytest.raises(ValueError, match="nll: expected losses"):
        min_k([])
