"""Disclosure by an API's answers about a row of logits: possible rows, bounds, a ledger."""

import collections
import dataclasses
import math
from collections.abc import Hashable

import numpy as np
from jaxtyping import Bool, Float, Int

from logitjax.ops import Array

# Steps of temperatures, and of a threshold `T log(min_p)` in nats. Separate grids are not coarse:
# 20 temperatures and 7 values of min_p make 130 thresholds, a median of .03 nats apart.
_TEMPERATURE, _THRESHOLD = 0.1, 0.5
# `top_p` is a mass at a temperature, `top_k` a rank: few of either, and masses at one temperature.
# For two tokens, twenty temperatures and four masses would make thresholds .1 nats apart.
_MASSES, _RANKS = (0.5, 0.8, 0.9, 0.95, 1.0), (0, 1, 5, 10, 20, 50, 100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The choice of a token from a row of logits by a request's fields, and what it reveals.

    ::

        u = z + bias, penalised, masked              -inf where a schema allows no token
        t ~ q = softmax(keep(u / T))                 T = 0: argmax u
        t = argmax keep(u / T) + noise               if the noise is known, or shared by requests

    An answer is a function of the row and the request, so it reveals a set: the rows that could
    give it. `likelihood` is the log-probability of a token for each row; `-inf` rules a row out.
    Texts, stops, finish reasons and counts are functions of the tokens and reveal no more.

    Attributes:
        temperature: 0 takes the largest.
        top_k: Number of tokens to keep; 0 keeps all.
        top_p: Mass to keep of the tokens left by `top_k`.
        min_p: Minimum probability to keep, relative to the largest.
        repetition_penalty: Divides positive logits of seen tokens, multiplies negative ones.
        presence_penalty: Subtracted from the logits of generated tokens.
        frequency_penalty: The same, once for each occurrence.

    >>> rows = np.log([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.9, 0.05, 0.05]])
    >>> print(Choice(min_p=0.25).likelihood(rows, 1).round(2))  # a third row would not give token 1
    [-1.5  -0.81  -inf]
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def law(
        self,
        rows: Float[Array, "*#batch vocab"],
        *,
        bias: Float[Array, "*#batch vocab"] | None = None,
        seen: Bool[Array, "*#batch vocab"] | None = None,
        counts: Int[Array, "*#batch vocab"] | None = None,
        vocab_where: Bool[Array, "*#batch vocab"] | None = None,
    ) -> np.ndarray:
        """Log-probabilities of drawing the tokens, float64.

        Args:
            seen: Tokens that the repetition penalty changes.
            counts: Number of times that the answer contains each token.
            vocab_where: Tokens that a schema allows.
        """
        u = np.asarray(rows, np.float64)
        u = u if bias is None else u + np.asarray(bias)
        if seen is not None:
            r = self.repetition_penalty
            u = np.where(np.asarray(seen), np.where(u > 0, u / r, u * r), u)
        if counts is not None:
            often = np.asarray(counts)
            u = u - self.presence_penalty * (often > 0) - self.frequency_penalty * often
        u = u if vocab_where is None else np.where(np.asarray(vocab_where), u, -np.inf)
        if not self.temperature:
            first = u.argmax(-1)[..., None] == np.arange(u.shape[-1])
            return np.where(first, 0.0, -np.inf)
        u = (u - u.max(-1, keepdims=True)) / self.temperature
        keep = np.isfinite(u)
        if self.top_k:
            k = min(self.top_k, u.shape[-1])
            keep &= u >= np.partition(u, -k, axis=-1)[..., -k, None]
        if self.top_p < 1:
            weights = np.where(keep, np.exp(u), 0)
            down = -np.sort(-weights)
            short = down.cumsum(-1) < self.top_p * down.sum(-1, keepdims=True)
            last = np.minimum(short.sum(-1, keepdims=True), u.shape[-1] - 1)
            keep &= weights >= np.take_along_axis(down, last, axis=-1)
        u = np.where(keep & (u >= math.log(self.min_p or 1e-300)), u, -np.inf)
        return u - np.log(np.exp(u).sum(-1, keepdims=True))

    def likelihood(
        self,
        rows: Float[Array, "rows vocab"],
        token: int,
        *,
        noise: Float[Array, " vocab"] | None = None,
        **moved: Array | None,
    ) -> np.ndarray:
        """Log-probability of an answer for each row that could have produced it, `[rows]`.

        Args:
            noise: Gumbel noise of the draw, if known: every result is then 0 or `-inf`.
            moved: Other changes to the distribution.
        """
        law = self.law(rows, **moved)
        if noise is None:
            return law[:, token]
        return np.where((law + np.asarray(noise)).argmax(-1) == token, 0.0, -np.inf)

    def rounded(self) -> "Choice":
        """The nearest choice on grids that are coarse even together, without penalties.

        Temperatures are multiples of 0.1, thresholds `T log(min_p)` multiples of half a nat; a
        `top_p` requires temperature 1. Fields that temperature 0 ignores are neutral.
        """
        if not self.temperature:
            return Choice(temperature=0.0)
        top_p = min(_MASSES, key=lambda mass: abs(mass - self.top_p))
        heat = round(max(1, round(self.temperature / _TEMPERATURE)) * _TEMPERATURE, 1)
        heat = heat if top_p == 1 else 1.0
        steps = round(heat * math.log(self.min_p or 1) / _THRESHOLD)
        return Choice(
            temperature=heat,
            top_k=min(_RANKS[1:], key=lambda k: abs(k - self.top_k)) if self.top_k else 0,
            top_p=top_p,
            min_p=math.exp(steps * _THRESHOLD / heat) if self.min_p else 0.0,
        )

    @property
    def certificate(self) -> tuple[float, float, int] | None:
        """Bounds that a drawn token has passed: threshold in nats, mass, rank; None if none is cut.

        Kept tokens have no finite divergence from cut ones: no sum of `soft` covers this.
        """
        if not self.temperature or (self.top_k, self.top_p, self.min_p) == (0, 1, 0):
            return None
        threshold = self.temperature * math.log(self.min_p) if self.min_p else -math.inf
        return (round(threshold, 6), self.top_p, self.top_k)

    @property
    def soft(self) -> float:
        """Maximum nats, per square nat, by which a draw with fresh noise distinguishes two rows.

        For rows whose difference D has half range d = (max D - min D) / 2, whatever is masked::

            KL(q || q') = int_0^1 (1 - s) Var_s(D) / T^2 ds <= d^2 / (2 T^2) = soft d^2

        Zero at temperature 0 and where something is cut off, which this does not bound.
        """
        if not self.temperature or self.certificate is not None:
            return 0.0
        scale = max(self.repetition_penalty, 1 / self.repetition_penalty)
        return scale**2 / (2 * self.temperature**2)

    def answers(self, probability: float, width: float) -> float:
        """Number of counted answers until 95 % intervals of a token's logit are `width` nats wide.

        `(2 1.96 T / width)^2 (1 - q) / q`, for a token of probability q in the law of this choice.

        >>> round(Choice().answers(1e-3, 0.2))
        383776
        """
        spread = (1 - probability) / probability
        return (2 * 1.96 * self.temperature / width) ** 2 * spread


class Ledger:
    """Adds up the information in answers about each context, over all clients.

    Every charge is known before the answer and depends on no logit: a price that did would itself
    be an answer. Adaptive answers out of A_1, ..., A_n possible ones reveal at most the
    logarithms::

        I(row; answers) <= log A_1 + ... + log A_n

    It bounds rows. From h + 1 contexts the head follows, however little each reveals. `limit` is
    the maximum number of nats for a context.

    >>> ledger = Ledger(limit=25.0)
    >>> [ledger.charge("a context", request, 10.8) for request in (1, 1, 2, 3)]
    [True, True, True, False]
    >>> ledger["a context"]
    21.6
    """

    def __init__(self, limit: float = math.inf):
        self.limit = limit
        # Nats, the logarithm of the number of possible answers; never an underestimate.
        self._contexts: dict[Hashable, float] = collections.defaultdict(float)
        self._answered: set[Hashable] = set()

    def __getitem__(self, context: Hashable) -> float:
        return self._contexts.get(context, 0.0)

    def add(self, context: Hashable, nats: float) -> None:
        """Add charges from before this ledger began: a ledger that forgets bounds nothing."""
        self._contexts[context] += nats

    def charge(self, context: Hashable, answer: Hashable, nats: float) -> bool:
        """Charge an answer once; False, and no charge, if it would exceed the limit.

        Args:
            answer: The parts of the request that determine the answer.
            nats: Logarithm of the number of possible answers.
        """
        if not nats or (context, answer) in self._answered:
            return True
        if self[context] + nats > self.limit:
            return False
        self.add(context, nats)
        self._answered.add((context, answer))
        return True
