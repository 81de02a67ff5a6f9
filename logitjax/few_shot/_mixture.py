"""Mixtures of methods: their weights, and the accuracy to expect, from the same pictures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from logitjax.few_shot._method import Inputs, Method, State

# Number of random halves of the pictures; each half chooses once and evaluates once.
_HALVES = 25
# Steps of expectation-maximisation, and the weight below which a method is dropped.
_STEPS, _LEAST = 300, 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Method):
    """Logarithms of weighted means of the methods' probabilities: `log sum w softmax(s / T)`.

    The state contains the methods' states, their weights w and their temperatures T.
    """

    methods: tuple[Method, ...]

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple({name: None for method in self.methods for name in method.needs})

    def logits(self, state: State, inputs: Inputs) -> jax.Array:
        parts = [
            jnp.log(weight) + jax.nn.log_softmax(method.logits(State(*one), inputs) / temperature)
            for method, one, weight, temperature in zip(self.methods, state.trained, *state.fixed)
        ]
        return jax.nn.logsumexp(jnp.stack(parts), axis=0)


def likeliest_weights(probabilities: np.ndarray) -> np.ndarray:
    """Weights `[methods]` of the mixture that makes the labels likeliest.

    Expectation-maximisation from equal weights: `w_m <- mean_i w_m p_im / sum_k w_k p_ik`. The
    likelihood is concave in w, and most of the best weights are 0: those below .01 are dropped.

    Args:
        probabilities: `[n, methods]`, positive probabilities of the labels.
    """
    weights = np.full(probabilities.shape[1], 1 / probabilities.shape[1])
    for _ in range(2):
        for _ in range(_STEPS):
            share = probabilities.T @ (1 / (probabilities @ weights))
            weights = weights * share / len(probabilities)
        weights = np.where(weights < min(_LEAST, weights.max()), 0.0, weights)
        weights /= weights.sum()
    # What was dropped may have been as good alone.
    return max([weights, *np.eye(len(weights))], key=lambda w: np.log(probabilities @ w).sum())


def recommend(
    probabilities: Mapping[str, np.ndarray], labels: np.ndarray, *, seed: int = 0
) -> tuple[dict[str, tuple[int, float]], float, float, float]:
    """Recommend a mixture of methods, and estimate its accuracy.

    Each method has the single setting, and the mixture the weights, that make the labels of all
    samples likeliest. On the pictures used to choose it, the best of many looks better than it is.
    For an unbiased estimate, settings and weights are chosen again on halves of the pictures and
    evaluated on the other halves. Returns number of the setting and weight by method (others have
    the weight 0), the estimate of the accuracy, and the ends of the 95 % interval.

    Args:
        probabilities: For each method `[samples, settings, n, classes]` of pictures that it did not
            learn from, as from `sweep`.
        labels: `[samples, n]` of these pictures, the same for each method, -1 for none. No method
            and no label are a ValueError.

    >>> often, seldom = (np.tile([[p, 1 - p]] * 10, (1, 1, 1, 1)) for p in (0.8, 0.3))
    >>> recommend({"often": often, "seldom": seldom}, np.zeros((1, 10), int))[:2]
    ({'often': (0, 1.0)}, 1.0)
    """
    labels = np.asarray(labels)
    present = labels >= 0
    if not probabilities or not present.any():
        raise ValueError("probabilities: expected labelled pictures of some method, got none")
    arrays = [np.asarray(one, np.float32) for one in probabilities.values()]
    rows = np.maximum(labels, 0)[:, None, :, None]
    # Positive, because a single 0 would exclude a setting.
    likely = [np.maximum(np.take_along_axis(one, rows, -1)[..., 0], 1e-6) for one in arrays]

    def choose(mask: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The settings of all methods, and their weights, on the masked pictures."""
        totals = [np.where(mask[:, None], np.log(one), 0.0).sum((0, 2)) for one in likely]
        settings = [int(total.argmax()) for total in totals]
        chosen = [one[:, setting][mask] for one, setting in zip(likely, settings)]
        return settings, likeliest_weights(np.stack(chosen, 1))

    rng, estimates = np.random.default_rng(seed), []
    for _ in range(_HALVES):
        order = rng.permuted(np.tile(np.arange(labels.shape[1]), (len(labels), 1)), axis=1)
        half = order < labels.shape[1] / 2
        # No picture both chooses and evaluates.
        for mask in (half, ~half):
            parts: Any = zip(arrays, *choose(mask & present))
            mixed = np.sum([w * one[:, setting] for one, setting, w in parts if w], axis=0)
            estimates.append((mixed.argmax(-1) == labels)[~mask & present].mean())
    accuracy, count = float(np.mean(estimates)), int(present.sum())
    # Halves overlap: each picture counts once in the interval.
    low, high = scipy.stats.binomtest(round(accuracy * count), count).proportion_ci(method="wilson")
    members = zip(probabilities, *choose(present))
    return (
        {name: (setting, float(weight)) for name, setting, weight in members if weight},
        *(accuracy, float(low), float(high)),
    )
