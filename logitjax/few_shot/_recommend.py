"""Recommendation of one of several methods and its expected accuracy from the same pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

# Number of random halves of the pictures; each half chooses once and evaluates once.
_HALVES = 50


def recommend(
    credit: Mapping[str, Sequence[np.ndarray]], *, seed: int = 0
) -> tuple[str, float, float, float]:
    """Recommend the method with the most credit at its best setting, and estimate its accuracy.

    A method is judged by the single setting that is best over all samples: with few pictures, the
    best of each sample favours methods whose settings differ most. Even so, the best of many looks
    better than it is on the pictures used to choose it. For an unbiased estimate, method and
    setting are chosen again on halves of the pictures and evaluated on the other halves. Returns
    the method, the estimate of its accuracy, and the ends of the 95 % interval.

    Args:
        credit: For each method, a `[settings, n]` array per sample, as from `sweep`: at least 1 if
            a setting is right on a picture that it did not learn from, otherwise less than 1, and
            -1 for pictures to ignore. No method, or a sample without pictures, is a ValueError.

    >>> good, bad = np.tile([1.0, 1, 1, 0], (2, 5)), np.tile([1.0, 0, 0, 0], (2, 5))
    >>> recommend({"bad": [bad], "good": [good]})[:2]
    ('good', 0.75)
    """
    if not credit or not all(np.size(one) for samples in credit.values() for one in samples):
        raise ValueError("credit: expected pictures of at least one method, got none")
    counts = [np.shape(sample)[1] for sample in next(iter(credit.values()))]
    rng = np.random.default_rng(seed)

    def choose(masks: Sequence[np.ndarray]) -> tuple[str, int]:
        """The best method and setting on the masked pictures."""
        means = {
            name: np.mean([_mean(one[:, mask]) for one, mask in zip(samples, masks)], 0)
            for name, samples in credit.items()
        }
        # Ties go to the first.
        name = max(means, key=lambda name: means[name].max())
        return name, int(means[name].argmax())

    # No picture both chooses and evaluates.
    estimates = []
    for _ in range(_HALVES):
        halves = [rng.permutation(n) < n / 2 for n in counts]
        for masks in (halves, [~half for half in halves]):
            name, setting = choose(masks)
            others = zip(credit[name], masks)
            estimates += [_mean(one[setting, ~mask], right=True) for one, mask in others]
    accuracy = float(np.mean(estimates))
    # All pictures choose the reported method.
    name, _ = choose([np.ones(n, bool) for n in counts])
    # Halves overlap: each picture counts once in the interval.
    successes = round(accuracy * sum(counts))
    low, high = scipy.stats.binomtest(successes, sum(counts)).proportion_ci(method="wilson")
    return name, accuracy, float(low), float(high)


def _mean(credit: np.ndarray, *, right: bool = False) -> Any:
    """Mean credit, or share of right pictures, over those that count; 0 without any."""
    values = credit >= 1 if right else np.maximum(credit, 0)
    return values.sum(-1) / np.maximum((credit >= 0).sum(-1), 1)
