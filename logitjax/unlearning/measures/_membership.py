"""Membership inference from a model's losses, and memorisation of texts."""

import zlib
from typing import Any

import numpy as np

# The share of other texts that an attack may mistake for members.
_FALSE_RATE = 0.05


def membership_auc(losses: Any, holdout_losses: Any) -> float:
    """Accuracy with which a loss reveals training texts (AUC): 0.5 is chance, 1 is perfect.

    P(loss of a text < loss of a held-out one), ties counting half: Yeom et al., 2018, and
    OpenUnlearning's `mia_loss`. Below 0.5 texts are less likely than unseen ones, which is as
    revealing.
    """
    from scipy import stats

    members, others = _both_sides(losses, holdout_losses)
    ranks = stats.rankdata(np.concatenate([members, others]))[len(members) :]
    pairs = len(members) * len(others)
    return float((ranks.sum() - len(others) * (len(others) + 1) / 2) / pairs)


def min_k(nll: Any, *, k: float = 0.4) -> float:
    """The mean loss of the `max(1, floor(k n))` least likely tokens of a text.

    References:
        Shi et al., 2024 (arXiv 2310.16789). OpenUnlearning's configurations have k = 0.4, its class
        0.2; it omits the last label, and scores an empty text as the most certain member.
    """
    nll = np.asarray(nll, np.float64).ravel()
    if not len(nll):
        raise ValueError("nll: expected losses of tokens, got none")
    if not 0 < k <= 1:
        raise ValueError(f"k: expected a share in (0, 1], got {k}")
    return float(np.sort(nll)[-max(1, int(k * len(nll))) :].mean())


def zlib_loss(nll: Any, text: str) -> float:
    """Sum of a text's losses divided by its compressed size in bytes.

    References:
        Carlini et al., Extracting training data, 2021 (arXiv 2012.07805). OpenUnlearning divides a
        loss a token by the bytes of the whole text, so longer texts look more like members.
    """
    nll = np.asarray(nll, np.float64).ravel()
    if not len(nll):
        raise ValueError("nll: expected losses of tokens, got none")
    return float(nll.sum() / len(zlib.compress(text.encode())))


def detection_rate(losses: Any, holdout_losses: Any) -> float:
    """The share of texts that an attack detects at 5 % false positives."""
    members, others = _both_sides(losses, holdout_losses)
    allowed = int(_FALSE_RATE * len(others))
    return float((members < np.sort(others)[allowed]).mean())


def memorisation(greedy: Any) -> tuple[float, float]:
    """Extraction strength and exact memorisation of a text, from which tokens are the likeliest.

    The former is the share that a model completes verbatim from its beginning: 1 - k / n, k the
    shortest beginning after which every token is the likeliest one (Carlini et al., 2021). The
    latter is the share of tokens that are, OpenUnlearning's `exact_memorization`. OpenUnlearning's
    extraction strength never falls below 1 / n: its loop leaves k at the last token.

    Args:
        greedy: Bool `[n]`; both are 0 without tokens.

    >>> memorisation([True, False, True, True])
    (0.5, 0.75)
    """
    greedy = np.asarray(greedy, bool)
    wrong, count = np.flatnonzero(~greedy), max(len(greedy), 1)
    # All after the last wrong token are right.
    begun = wrong[-1] + 1 if len(wrong) else 0
    return float((len(greedy) - begun) / count), float(greedy.sum() / count)


def _both_sides(losses: Any, holdout_losses: Any) -> tuple[np.ndarray, np.ndarray]:
    members = np.asarray(losses, np.float64).ravel()
    others = np.asarray(holdout_losses, np.float64).ravel()
    for name, array in (("losses", members), ("holdout_losses", others)):
        if not len(array) or np.isnan(array).any():
            raise ValueError(f"{name}: expected numbers, got {len(array)} of which some are nan")
    return members, others
