"""The strength at which a candidate is judged, and what is asked to find it."""

import types

import numpy as np
import pytest
from etils import epath

from logitjax.unlearning._looks import Looks, diverged
from logitjax.unlearning._selection import Goal, Limits
from logitjax.unlearning._training import Training
from logitjax.unlearning._unlearn import Unlearning
from logitjax.unlearning.methods import METHODS

# Nats a token of the worst answer without any change, and how much a strength of 1 adds.
NATS = {"asked": (0.1, 6.0), "in a role": (0.5, 2.0), "in context": (2.0, 1.0)}


class Questions:
    """Answers whose likelihood falls with the strength, each way at its own rate."""

    def __init__(self):
        self.rows = {"validation": [types.SimpleNamespace(kind="retain")]}
        self.rows |= {"reworded": [], "holdout": [1]}
        self.asked = []

    def in_way(self, part, way):
        return [way] if way in NATS else []

    def mean_nll(self, strength, rows):
        (way,) = rows
        self.asked.append((way, strength))
        start, rate = NATS[way]
        return np.array([start + rate * strength, start + rate * strength + 1])

    def probabilities(self, strength, part):
        return np.array([0.9])

    def perplexity(self, strength, part):
        return None


class Candidate(Training):
    """A trained change, of which only the strength matters."""

    def __init__(self, questions):
        self.questions = questions
        self.config = types.SimpleNamespace(method=METHODS.parse("gradient_difference"))

    def read(self, candidate):
        return None

    def files(self, candidate):
        return {}

    def at(self, trained, strength):
        return strength


def test_every_way_meets_the_goal_and_none_is_asked_twice_at_a_strength():
    questions = Questions()
    looks = Looks(Candidate(questions), epath.Path("before.json"))
    looks.goal = Goal(worst=dict.fromkeys(NATS, 0.02), probability=0.01, source="")
    looks._goal_in = lambda ways: looks.goal
    looks.before = {"probabilities": {"forget": [0.9], "validation": [0.9]}, "perplexity": None}
    look = looks._look({"round": 0, "step": 1}, ["asked"])
    strength = look["strength"]
    # The slowest way decides, and the answers of all are those at this strength.
    assert look["excess"] == look["ways"]["in context"] == max(look["ways"].values())
    for way, (start, rate) in NATS.items():
        expected = np.exp(-start - rate * strength) / 0.02
        assert look["ways"][way] == pytest.approx(expected)
    assert looks.goal.gap(look["excess"]) <= 0.25
    assert len(questions.asked) == len(set(questions.asked))
    ways_at = {s: [w for w, other in questions.asked if other == s] for _, s in questions.asked}
    assert sorted(ways_at[strength]) == sorted(NATS)
    # The first that misses the goal is the last that is asked, and at the next strength the first.
    assert ways_at[1.0] == ["asked", "in a role"]
    assert ways_at[4.0][0] == "in a role"


def test_a_round_that_diverges_at_once_ends_the_run_and_nothing_more_is_asked():
    run = object.__new__(Unlearning)
    run.config = types.SimpleNamespace(
        rounds=2, limits=Limits(), method=METHODS.parse("gradient_difference")
    )
    run._training = types.SimpleNamespace(record=lambda name, make: make())
    # Without `searched`: there is no candidate to ask.
    run._looks = types.SimpleNamespace(
        meets=lambda c: False, leaks=lambda excess: [], judged=lambda c: c
    )
    run._round = lambda number, ways, limits: [diverged({"round": number, "step": 25})]
    candidates, _ = run._rounds()
    assert [(c["round"], c["broken"]) for c in candidates] == [(0, ["finite"])]
