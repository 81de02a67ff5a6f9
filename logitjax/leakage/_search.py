"""Logits from an API that reports only the drawn token: comparisons under a bias."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from logitjax.leakage._oracle import Asked
from logitjax.ops import Array

# A batch that its queries no longer narrow is given up: its answers are contradictory.
_STUCK = 20
# An API adds biases to logits in float32, which rounds sums of up to 128 nats by this much on each
# side of a comparison.
_ROUNDED = 2.0**-18


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchedLogits:
    """Bounds `[m]` of logits minus the largest one, in nats.

    A `lower` of -inf marks a token that stayed below the assumed range. `contradictions` counts
    answers that fit no logits and were left out: the API adds fresh noise, and the bounds hold only
    up to it. Most answers under noise fit some logits, so zero is not a proof.
    """

    lower: np.ndarray
    upper: np.ndarray
    queries: int
    contradictions: int

    @property
    def middle(self) -> np.ndarray:
        """`[m]`: the middle of the bounds; NaN without a lower bound."""
        finite = np.isfinite(self.lower)
        return np.where(finite, (np.where(finite, self.lower, 0.0) + self.upper) / 2, np.nan)


class Boxes:
    """Bounds on u, the logits scaled to [0, 1] with the winner at 1.

    `apart[i, j]` is an upper bound of `u_j - u_i`. An answer gives those of one token, and the
    matrix is kept closed under the triangle inequality, in O(N^2) per answer. By rounding, a drawn
    token may have been below another by up to `slack`.
    """

    def __init__(self, count: int, winner: int, slack: float = 0.0):
        self.winner, self.slack = winner, slack
        self.apart = np.ones((count, count))
        self.apart[winner] = 0.0
        np.fill_diagonal(self.apart, 0.0)

    @property
    def lower(self) -> np.ndarray:
        return 1.0 - self.apart[:, self.winner]

    @property
    def upper(self) -> np.ndarray:
        return 1.0 + self.apart[self.winner]

    def learn(self, drawn: int, bias: np.ndarray) -> bool:
        """Record that a token was drawn under a bias; False if that contradicts the bounds."""
        out = np.minimum(self.apart[drawn], bias[drawn] - bias + self.slack)
        out = (out[:, None] + self.apart).min(axis=0)
        if out[drawn] < 0:
            return False
        self.apart = np.minimum(self.apart, self.apart[:, drawn][:, None] + out[None, :])
        return True


def _one_of_n(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Raise all tokens so that each is drawn with probability 1 / N if uniform in its bounds."""
    count = len(lower)
    return 1.0 - lower - count ** (-1.0 / (count - 1)) * (upper - lower)


def search_logits(
    oracle: Asked,
    prompt: Sequence[int] | Array,
    tokens: Sequence[int] | Int[Array, " m"],
    *,
    span: float = 40.0,
    tolerance: float = 0.01,
) -> SearchedLogits:
    """Bound logits when an API only reports the token it draws at temperature 0.

    Tokens are queried in batches with the token drawn without a bias, which no other can beat.
    Their range is assumed to be `span` nats, and bounds end up `tolerance` plus some 1e-5 apart.
    """
    policy = oracle.policy
    if policy.bias == "none":
        raise ValueError("oracle: expected an API that accepts a logit bias, got bias='none'")
    if not 0 < tolerance < span <= policy.bias_limit:
        want = f"more than tolerance={tolerance} and at most the largest bias, {policy.bias_limit}"
        raise ValueError(f"span: expected {want}, got {span}")
    array = np.asarray(tokens, np.int64)
    winner = int(np.asarray(oracle.ask([prompt]).tokens)[0, 0])
    rest = array[array != winner]
    lower, upper = {winner: 0.0}, {winner: 0.0}
    queries, contradictions = 1, 0
    size = max(1, policy.max_biased - 1)
    for start in range(0, len(rest), size):
        batch = np.array([winner, *rest[start : start + size]])
        boxes, count, wrong = _narrow(oracle, prompt, batch, span, tolerance)
        # A token that was never drawn may lie anywhere below: that its u is at least 0 was assumed.
        low = np.where(boxes.lower > 0, (boxes.lower - 1) * span, -np.inf)
        lower |= dict(zip(batch.tolist(), low.tolist(), strict=True))
        upper |= dict(zip(batch.tolist(), ((boxes.upper - 1) * span).tolist(), strict=True))
        queries += count
        contradictions += wrong
    low, high = (np.array([one[token] for token in array.tolist()]) for one in (lower, upper))
    return SearchedLogits(lower=low, upper=high, queries=queries, contradictions=contradictions)


def _narrow(
    oracle: Asked, prompt: Any, batch: Int[np.ndarray, " n"], span: float, tolerance: float
) -> tuple[Boxes, int, int]:
    """Bounds of one batch, the winner first, with the numbers of queries and contradictions."""
    boxes, queries, contradictions = Boxes(len(batch), 0, 2 * _ROUNDED / span), 0, 0
    places = {int(token): location for location, token in enumerate(batch)}
    in_row = 0
    # Rounding leaves a slack on both sides, which no query closes.
    least = tolerance / span + 2 * boxes.slack
    while (boxes.upper - boxes.lower).max() > least and in_row < _STUCK:
        bias = _one_of_n(boxes.lower, boxes.upper)
        nats = (bias * span).astype(np.float32)
        answer = oracle.ask_biased(prompt, batch[None], nats[None])
        drawn = places.get(int(np.asarray(answer.tokens)[0, 0]))
        queries += 1
        existing = boxes.apart
        # The bias as it was sent: the rounded one was compared.
        agrees = drawn is not None and boxes.learn(drawn, nats.astype(np.float64) / span)
        narrows = (existing - boxes.apart).max() > boxes.slack
        in_row = 0 if narrows else in_row + 1
        contradictions += not agrees
    return boxes, queries, contradictions
