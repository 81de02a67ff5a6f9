"""Choosing a candidate that forgot enough and kept the rest, without a retrained model."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

# Probabilities per token: above the first an answer is still given, below the second it is not,
# regardless of a control.
_STILL_SAID, _NOT_SAID = 0.5, 0.005
# Least probability of a row that counts as known: below it, the share kept is noise.
KNOWN = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on what a model has to keep, as shares of its values before."""

    # Mean probability of answers to keep, of every kind.
    probability: float = 0.97
    # Probability of each single answer that the model knew.
    row: float = 0.9
    # ROUGE-L F1 of answers generated for rows to keep, of every kind.
    rouge: float = 0.97
    # Entropy of word pairs and triples in these answers.
    fluency: float = 0.95
    # Largest factor for the perplexity of other text.
    perplexity: float = 1.02

    def broken(self, kept: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the limits that these shares violate; None means not measured."""
        items = []
        for name, limit in vars(self).items():
            value = kept.get(name)
            holds = value is None or (value <= limit if name == "perplexity" else value >= limit)
            if not holds:  # nan too
                items.append(name)
        return tuple(items)

    def halved(self) -> "Limits":
        """Limits with half of the room, because the choice must also hold on other rows."""
        return Limits(**{n: (1 + v) / 2 if v > 0 else 0.0 for n, v in vars(self).items()})


def kept_shares(after: Any, before: Any, kinds: Sequence[str]) -> dict[str, float]:
    """The share of the mean that is left, by kind of row."""
    shares = {}
    for kind in dict.fromkeys(kinds):
        at = [i for i, other in enumerate(kinds) if other == kind]
        old = float(np.mean([before[i] for i in at]))
        # A mean of zero has no share.
        if old:
            shares[kind] = float(np.mean([after[i] for i in at])) / old
    return shares


def least_kind(shares: Mapping[str, float]) -> float | None:
    """The smallest share among kinds that the model knew, or among all if it knew none."""
    learned = [share for kind, share in shares.items() if kind != "unknown"]
    return least(learned or shares.values())


def least(values: Any) -> float | None:
    """The smallest number, or nan if there is one, which `min` may miss; None if empty."""
    values = list(values)
    return float(np.min(values)) if values else None


def least_row(after: Any, before: Any) -> float | None:
    """The smallest share left of a known row; None if none was known."""
    return least(new / old for new, old in zip(after, before, strict=True) if old >= KNOWN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """Limits for forgotten answers, relative to answers that were never learned.

    Every answer counts, in every way of asking: `excess` is the largest probability divided by
    that of the most likely control answer, asked in the same way.
    """

    # The largest probability of answers that were never taught, by way of asking.
    worst: Mapping[str, float]
    # The median of these answers, asked directly.
    probability: float
    # Description of the source of these answers.
    source: str

    # The excess to train to, and the largest allowed: other wordings elicit more.
    aim: ClassVar[float] = 1.4
    most: ClassVar[float] = 2.0

    @classmethod
    def of(cls, unseen: Mapping[str, Any], source: str) -> "Goal":
        """The goal from probabilities of unseen answers by way; `asked` stands for other ways."""
        least, most = _NOT_SAID / cls.most, _STILL_SAID / cls.most
        return cls(
            worst={way: float(np.clip(np.max(rows), least, most)) for way, rows in unseen.items()},
            probability=float(np.median(unseen["asked"])),
            source=source,
        )

    def limit(self, way: str) -> float:
        """The largest probability that an answer may have when asked in this way."""
        return self.most * self.worst.get(way, self.worst["asked"])

    def excess(self, rows: Mapping[str, Any]) -> dict[str, float]:
        """Probability of the worst row relative to the worst control answer, by way of asking."""
        return {
            way: float(self.most * np.max(probabilities) / self.limit(way))
            for way, probabilities in rows.items()
            if len(probabilities)
        }

    def gap(self, excess: float) -> float:
        """The distance of an excess from the aim, in nats, on either side."""
        return abs(_above(self, excess))

    def met(self, excess: float) -> bool:
        """Whether no row is more than twice as likely as the worst of the control."""
        return excess <= self.most


def matched_strength(
    excess: Callable[[float], float],
    goal: Goal,
    *,
    most: float = 1.0,
    without: float = math.nan,
    tolerance: float = 0.25,
    trials: int = 8,
) -> tuple[float, float]:
    """The strength, of an assistant or of adapters, at which the worst answer is at `goal.aim`.

    By false position on logarithms, a tenth or more from both ends; the middle if one is unknown.
    """
    tried: list[tuple[float, float]] = []
    # A strength, and the distance of its answers above the goal, in nats.
    low, high, at = (0.0, _above(goal, without)), (most, math.nan), min(1.0, most / 2)
    for _ in range(trials):
        result = excess(at)
        tried.append((at, result))
        if math.isfinite(result) and abs(_above(goal, result)) <= tolerance and goal.met(result):
            break
        if result > goal.aim:
            low = (at, _above(goal, result))
        else:
            high = (at, _above(goal, result))
        if high[0] == most and all(other != most for other, _ in tried):
            # Is it reached at all?
            at = most
        elif low[0] == high[0]:
            break
        else:
            share = 0.5
            if low[1] > 0 > high[1]:
                share = min(max(low[1] / (low[1] - high[1]), 0.1), 0.9)
            at = low[0] + share * (high[0] - low[0])
    items = [pair for pair in tried if math.isfinite(pair[1])]
    if not items:
        return 0.0, math.nan
    return min(items, key=lambda pair: (not goal.met(pair[1]), goal.gap(pair[1])))


def _above(goal: Goal, excess: float) -> float:
    return math.log(max(excess, 1e-300)) - math.log(goal.aim)


def least_share(kept: Mapping[str, Any]) -> float:
    """Smallest remaining share of any measure, perplexity by its inverse; None is not measured."""
    shares = [kept.get(name) for name in ("probability", "row", "rouge", "fluency")]
    if kept.get("perplexity"):
        shares.append(1 / kept["perplexity"])
    return min((share for share in shares if share is not None), default=0.0)


def share_interval(
    after: Any, before: Any, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The share of a mean over rows that is left, and the ends of its bootstrap interval.

    >>> share_interval([1.0, 2.0], [2.0, 4.0])
    (0.5, 0.5, 0.5)
    """
    after, before = (np.asarray(values, np.float64) for values in (after, before))
    picked = np.random.default_rng(seed).integers(0, len(after), (resamples, len(after)))
    shares = after[picked].mean(1) / np.maximum(before[picked].mean(1), 1e-300)
    tail = (1 - confidence) / 2
    low, high = np.quantile(shares, (tail, 1 - tail))
    return float(after.mean() / max(before.mean(), 1e-300)), float(low), float(high)
