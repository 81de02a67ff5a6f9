"""Choosing what has forgotten enough and lost nothing else, without a retrained model."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What has to be left of a model, as shares of what it was before.

    Attributes:
        probability: Least share of the mean probability of answers to keep.
        rouge: Least share of the ROUGE-L F1 of what is generated for them.
        fluency: Least share of the entropy of word pairs and triples in that.
        perplexity: Largest factor of the perplexity of other text.
    """

    probability: float = 0.98
    rouge: float = 0.98
    fluency: float = 0.98
    perplexity: float = 1.02

    def broken(self, kept: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the limits that these shares do not keep to; what is None was not measured.

        >>> Limits().broken({"probability": 0.99, "rouge": 0.9, "perplexity": 1.5})
        ('rouge', 'perplexity')
        """
        found = []
        for field in dataclasses.fields(self):
            value, limit = kept.get(field.name), getattr(self, field.name)
            if value is None:
                continue
            ok = value <= limit if field.name == "perplexity" else value >= limit
            if not ok:  # nan too
                found.append(field.name)
        return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """How likely a forgotten answer may be: as likely as one that was never known.

    Attributes:
        probability: To be reached, two-sided.
        floor: Below it an answer is less likely than unseen ones are, which gives it away.
        source: What this was taken from, in words.
    """

    probability: float
    floor: float
    source: str

    @classmethod
    def of(cls, unseen: Any, source: str) -> "Goal":
        """The median of probabilities of unseen answers, and their 5 % point.

        >>> Goal.of([0.1, 0.2, 0.4], "a holdout").probability
        0.2
        """
        unseen = np.asarray(unseen, np.float64)
        return cls(
            probability=float(np.median(unseen)),
            floor=float(np.quantile(unseen, 0.05)),
            source=source,
        )

    def gap(self, probability: float) -> float:
        """How far a probability is from it, in nats, whichever side."""
        return abs(math.log(max(probability, 1e-300)) - math.log(max(self.probability, 1e-300)))

    @property
    def aim(self) -> float:
        """What to aim at: the goal, or somewhat above a floor that is near it."""
        return max(self.probability, 1.25 * self.floor)

    def met(self, probability: float) -> bool:
        """Within a factor of 2, and not below the floor."""
        return self.gap(probability) <= math.log(2) and probability >= self.floor


def matched_strength(
    probability: Callable[[float], float],
    goal: Goal,
    *,
    most: float = 1.0,
    without: float = math.nan,
    tolerance: float = 0.25,
    trials: int = 8,
) -> tuple[float, float]:
    """The strength at which forgotten answers are as likely as the goal says, by false position.

    Between two strengths around the goal the next one is where a straight line through their
    logarithms meets it, but no nearer to either than a tenth; the middle where one is not known.
    Strength is what the update is multiplied by, an assistant's alpha or a factor of adapters; it
    takes no training to try one. What is aimed at is `goal.aim`.

    >>> goal = Goal.of([0.02, 0.2, 0.4], "a holdout")
    >>> strength, found = matched_strength(lambda s: 0.9 * 0.1**s, goal, most=2.0)
    >>> 0.155 < found < 0.257
    True
    """
    tried: list[tuple[float, float]] = []
    # A strength, and how far above the goal it leaves answers, in nats.
    low, high, at = (0.0, _above(goal, without)), (most, math.nan), most / 2
    for _ in range(trials):
        found = probability(at)
        tried.append((at, found))
        if math.isfinite(found) and abs(_above(goal, found)) <= tolerance and goal.met(found):
            break
        if found > goal.aim:
            low = (at, _above(goal, found))
        else:
            high = (at, _above(goal, found))
        if high[0] == most and all(other != most for other, _ in tried):
            at = most  # Is it reached at all?
        elif low[0] == high[0]:
            break
        else:
            share = 0.5
            if low[1] > 0 > high[1]:
                share = min(max(low[1] / (low[1] - high[1]), 0.1), 0.9)
            at = low[0] + share * (high[0] - low[0])
    known = [pair for pair in tried if math.isfinite(pair[1])]
    if not known:
        return 0.0, math.nan
    return min(known, key=lambda pair: (not goal.met(pair[1]), goal.gap(pair[1])))


def _above(goal: Goal, probability: float) -> float:
    """How far above what is aimed at, in nats."""
    return math.log(max(probability, 1e-300)) - math.log(max(goal.aim, 1e-300))


def strength_on_curve(strengths: Any, probabilities: Any, goal: Goal) -> float:
    """The least strength at which a curve comes down to `goal.aim`, straight between its points.

    >>> goal = Goal.of([0.02, 0.2, 0.4], "a holdout")
    >>> round(strength_on_curve([0.0, 1.0, 2.0], [0.9, 0.4, 0.1], goal), 6)
    1.5
    """
    logs = np.log(np.maximum(np.asarray(probabilities, np.float64), 1e-300))
    wanted = math.log(max(goal.aim, 1e-300))
    below = np.flatnonzero(logs <= wanted)
    if not len(below):
        return float(strengths[-1])
    at = int(below[0])
    if at == 0:
        return float(strengths[0])
    share = (logs[at - 1] - wanted) / (logs[at - 1] - logs[at])
    return float(strengths[at - 1] + share * (strengths[at] - strengths[at - 1]))


def least_share(kept: Mapping[str, Any]) -> float:
    """The least of what is left, perplexity by its inverse; what is None was not measured.

    >>> least_share({"probability": 0.9, "rouge": None, "perplexity": 1.25})
    0.8
    """
    shares = [kept.get(name) for name in ("probability", "rouge", "fluency")]
    if kept.get("perplexity"):
        shares.append(1 / kept["perplexity"])
    return min((share for share in shares if share is not None), default=0.0)


def pareto(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other is as good as in everything and better in something.

    >>> pareto([(1, 3), (2, 2), (1, 2)])
    [0, 1]
    """
    points = [tuple(point) for point in points]
    return [
        i
        for i, point in enumerate(points)
        if not any(all(a >= b for a, b in zip(other, point)) and other != point for other in points)
    ]


def share_interval(
    after: Any, before: Any, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The share of a mean that is left, with its bootstrap interval over rows.

    Args:
        after: One number for each row.
        before: Numbers of the same rows before.
        confidence: Confidence of the interval.
        resamples: Number of resamplings of rows.
        seed: Seed of the resamplings.

    Returns:
        The ratio of the means, and the interval's ends.

    >>> share_interval([1.0, 2.0], [2.0, 4.0])
    (0.5, 0.5, 0.5)
    """
    after, before = (np.asarray(values, np.float64) for values in (after, before))
    picked = np.random.default_rng(seed).integers(0, len(after), (resamples, len(after)))
    shares = after[picked].mean(1) / np.maximum(before[picked].mean(1), 1e-300)
    tail = (1 - confidence) / 2
    low, high = np.quantile(shares, (tail, 1 - tail))
    return float(after.mean() / max(before.mean(), 1e-300)), float(low), float(high)
