"""Probabilities and truth ratios of answers, from losses a token, and the utility made of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

Form = Literal["geometric", "arithmetic"]
UTILITY_SETS = ("retain", "real_authors", "world_facts")
UTILITY_PARTS = ("probability", "rouge_l", "truth_ratio")


def answer_probability(average_nll: Any) -> np.ndarray:
    """Length-normalised likelihood of answers: ``exp(-nll / tokens) = P(a | q)^(1 / |a|)``."""
    return np.exp(-np.asarray(average_nll, np.float64))


def normalised_probability(
    average_nll: Any, perturbed_nll: Sequence[Any], *, eps: float = 0.0
) -> np.ndarray:
    """Share of an answer among itself and wrong ones, length-normalised: `p / (p + sum_i p_i)`.

    TOFU's probability of the real-world sets; OpenUnlearning's `probability_w_options`.
    """
    truth, wrong = _check(average_nll, perturbed_nll)
    _check_eps(eps)
    # Infinite odds: probability 0.
    with np.errstate(over="ignore"):
        odds = [np.exp(one - others).sum() for one, others in zip(truth, wrong)]
        # 0 times infinity.
        if eps:
            odds = odds + eps * np.exp(truth)
    return 1.0 / (1.0 + np.asarray(odds, np.float64))


def preference(truth_nll: Any, perturbed_nll: Sequence[Any], *, eps: float = 0.0) -> np.ndarray:
    """Preference for the right answer over wrong ones: `prob_mean`, 0.5 for none.

    `c / (c + w)`, c = exp(-nll), w = exp(-mean_i nll_i). OpenUnlearning's `prob_mean` tells models
    that know from those that do not better than all measures of text (AUC 0.947, arXiv 2605.24614).
    """
    truth, wrong = _check(truth_nll, perturbed_nll)
    return normalised_probability(truth, [[others.mean()] for others in wrong], eps=eps)


def log_truth_ratio(
    truth_nll: Any, perturbed_nll: Sequence[Any], *, form: Form = "geometric", eps: float = 0.0
) -> np.ndarray:
    """The logarithm of `truth_ratio`, which neither overflows nor runs into ties."""
    if form not in get_args(Form):
        raise ValueError(f"form: expected 'geometric' or 'arithmetic', got {form!r}")
    _check_eps(eps)
    truth, wrong = _check(truth_nll, perturbed_nll)
    if form == "geometric":
        mean = [-others.mean() for others in wrong]
    else:
        # The logarithm of the mean probability.
        mean = [np.logaddexp.reduce(-others) - np.log(len(others)) for others in wrong]
    below = np.logaddexp(-truth, np.log(eps)) if eps else -truth  # log(P + eps)
    return np.asarray(mean, np.float64) - below


def truth_ratio(
    truth_nll: Any, perturbed_nll: Sequence[Any], *, form: Form = "geometric", eps: float = 0.0
) -> np.ndarray:
    """Likelihood of wrong answers relative to the rephrased right one: above 1 is wrong.

    It is `exp(-mean_i nll_i) / exp(-nll)`, or `mean_i exp(-nll_i) / exp(-nll)` if arithmetic.

    References:
        Maini et al., 2024 (arXiv 2401.06121), equation 1, which has no eps.
    """
    with np.errstate(over="ignore"):
        return np.exp(log_truth_ratio(truth_nll, perturbed_nll, form=form, eps=eps))


def truth_ratio_utility(log_ratio: Any) -> float:
    """Preference for right answers over wrong ones: the mean of ``max(0, 1 - R)``."""
    # max(0, 1 - R), without rounding near R = 1.
    return float(np.mean(np.maximum(0.0, -np.expm1(np.minimum(log_ratio, 0.0)))))


def truth_ratio_forget(log_ratio: Any, *, eps: float = 0.0) -> float:
    """Indifference between right answers and wrong ones: the mean of `min(R, 1 / R)`."""
    log_ratio = np.asarray(log_ratio, np.float64)
    if not eps:
        # min(R, 1 / R), without overflow.
        return float(np.mean(np.exp(-np.abs(log_ratio))))
    with np.errstate(over="ignore"):
        ratio = np.exp(log_ratio)
    return float(np.mean(np.minimum(ratio, 1.0 / (ratio + eps))))


def model_utility(parts: Mapping[str, float]) -> float:
    """The harmonic mean of TOFU's nine numbers; one that is 0 makes it 0."""
    from scipy import stats

    names = {f"{a}.{b}" for a in UTILITY_SETS for b in UTILITY_PARTS}
    if set(parts) != names:
        raise ValueError(
            f"parts: expected TOFU's nine numbers, got none of {sorted(names - set(parts))} and "
            f"also {sorted(set(parts) - names)}"
        )
    values = np.asarray([parts[name] for name in sorted(names)], np.float64)
    if not (values >= 0).all():
        raise ValueError(f"parts: expected numbers from 0 to 1, got {dict(parts)}")
    return float(stats.hmean(values))


def _check_eps(eps: float) -> None:
    if not 0 <= eps < 1:
        raise ValueError(f"eps: expected a number from 0 to below 1, got {eps}")


def _check(truth_nll: Any, perturbed_nll: Sequence[Any]) -> tuple[np.ndarray, list[np.ndarray]]:
    truth = np.asarray(truth_nll, np.float64)
    wrong = [np.asarray(others, np.float64) for others in perturbed_nll]
    if truth.ndim != 1 or not len(truth):
        raise ValueError(f"truth_nll: expected one loss an item, got shape {truth.shape}")
    if len(truth) != len(wrong):
        raise ValueError(
            f"perturbed_nll: expected one list for each of {len(truth)} items, got {len(wrong)}"
        )
    for i, others in enumerate(wrong):
        if others.ndim != 1 or not len(others):
            raise ValueError(
                f"perturbed_nll: expected losses of wrong answers of item {i}, got shape "
                f"{others.shape}"
            )
        for name, values in (("truth_nll", truth[i : i + 1]), ("perturbed_nll", others)):
            if not np.isfinite(values).all():
                raise ValueError(f"{name}: expected finite losses of item {i}, got {values}")
    return truth, wrong
