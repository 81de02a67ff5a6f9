"""Choice of the next draft length from the costs and acceptance of drafts so far."""

import collections
import statistics
from collections.abc import Hashable
from typing import Any

# The share of time that trying drafts may cost, and about how many tested tokens give acceptance.
_LOSS, _MEMORY = 0.01, 48.0
# Losses in a row by whose number that share is divided, up to this one, and the predicted speed-up
# from which it is not: near 1, what was lost is soon won.
_LOSSES, _NEAR = 4, 0.9


class DraftControl:
    """Chooses draft lengths by measured costs and acceptance.

    A round of length d gives ``(1 - a^(d+1)) / (1 - a)`` tokens if drafts are accepted with
    probability a. It pays if that is more than its time divided by a plain step's. If no length
    pays, rows decode step by step, and a draft is tried now and then, as often as that costs
    less than a hundredth of the time, and a quarter of that after four tries in vain. Costs are
    medians of the last few calls, without calls that compiled. Reuse one control for calls of
    one kind, so that it keeps its estimates.

    Args:
        draft: the drafter: a model with the same tokenizer, as for `CachedModel.of`; a
            `models.DraftHead` trained for the large one; a member of the ensemble, ``'expert'`` or
            ``'base'`` (the first) or an index among large, experts and bases; or ``'prompt'``: the
            earlier continuation of the last tokens.
        lengths: numbers of tokens to draft at once, ascending, besides 0; each compiles a program.
            By default (4, 9) for ``'prompt'`` and (2, 5) for models. One number is always used.
        token_map: for a drafting model with other token ids, from `fusion.vocabulary_map`.

    >>> control = DraftControl(lengths=(2, 5))
    >>> for length, seconds in ((0, 1.0), (2, 1.4), (5, 2.0)):
    ...     control.record(length, seconds=0.0)  # compiles
    ...     control.record(length, seconds=seconds, tested=10 * length, accepted=9 * length)
    >>> control.choose(), round(control.predicted(5), 1)
    (5, 2.3)
    """

    def __init__(
        self,
        draft: Any = "expert",
        lengths: tuple[int, ...] | int | None = None,
        *,
        token_map: Any = None,
    ):
        if lengths is None:
            looked_up = isinstance(draft, str) and draft == "prompt"
            lengths = (4, 9) if looked_up else (2, 5)
        self._fixed = lengths if isinstance(lengths, int) else None
        lengths = (lengths,) if isinstance(lengths, int) else lengths
        if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
            raise ValueError(f"lengths: expected ascending numbers of at least 1, got {lengths}")
        self.draft, self.lengths, self.token_map = draft, tuple(lengths), token_map
        # Even odds, worth less than two tokens: the first measurement decides.
        self._accepted, self._tested = 0.75, 1.5
        self._costs: dict[Hashable, collections.deque] = {}
        self._compiled: set[Hashable] = set()
        self._spent = self._lost = 0.0
        self._losses = 0
        self._plain_worth = self._timed = 0.0

    @property
    def acceptance(self) -> float:
        """Estimated probability that a drafted token is accepted."""
        return self._accepted / self._tested

    @property
    def speedup(self) -> float | None:
        """Plain steps' time divided by the time spent on as many tokens; None before both."""
        return self._plain_worth / self._timed if self._timed else None

    def cost(self, length: int, kind: Hashable = None) -> float | None:
        """Seconds of a round (of a step for length 0); None if it has not been timed."""
        times = self._costs.get((kind, length))
        return statistics.median(times) if times else None

    def predicted(self, length: int, kind: Hashable = None) -> float | None:
        """Speed-up of rounds of this length over plain steps; None before both are timed."""
        plain, cost = self.cost(0, kind), self.cost(length, kind)
        if plain is None or cost is None:
            return None
        return expected_tokens(self.acceptance, length) * plain / cost

    def choose(self, kind: Hashable = None) -> int:
        """The next length; ``kind`` distinguishes calls of different cost, such as batch sizes."""
        if self._fixed is not None:
            return self._fixed
        plain = self.cost(0, kind)
        # Unknown costs are timed first: plain steps, then the cheapest drafts.
        if plain is None:
            return 0
        shortest = self.lengths[0]
        existing = self.cost(shortest, kind)
        if existing is None:
            return shortest
        # Costs of untimed lengths are interpolated linearly.
        slope = (existing - plain) / shortest
        gains = {}
        for length in self.lengths:
            cost = self.cost(length, kind) or max(plain + slope * length, plain)
            gains[length] = expected_tokens(self.acceptance, length) * plain / cost
        best = max(gains, key=lambda length: gains[length])
        losses = 1 if gains[best] > _NEAR else min(max(1, self._losses), _LOSSES)
        return best if gains[best] > 1 or self._lost < _LOSS / losses * self._spent else 0

    def record(
        self,
        length: int,
        *,
        seconds: float,
        rounds: int = 1,
        tokens: float | None = None,
        tested: int = 0,
        accepted: int = 0,
        kind: Hashable = None,
        program: Hashable = None,
    ) -> None:
        """Record a call.

        Args:
            length: drafted tokens a round; 0: plain steps.
            rounds: rounds (or steps) in the call.
            tokens: average number of tokens per row and round; by default from the acceptance.
            tested: drafted tokens that were compared.
            kind: as for `choose`.
            program: distinguishes calls of one kind and length that are compiled separately.
        """
        if tested:
            # An exponential mean: texts change, and with them how well they are guessed.
            keep = max(0.0, 1 - tested / _MEMORY)
            self._accepted = keep * self._accepted + accepted
            self._tested = keep * self._tested + tested
        # The first call of a program compiles it, so its time says nothing about the next ones.
        if (kind, length, program) not in self._compiled:
            self._compiled.add((kind, length, program))
            return
        if rounds == 0:
            return
        # A median of nine ignores two hiccups of the machine and adapts after a few calls.
        times = self._costs.setdefault((kind, length), collections.deque(maxlen=9))
        times.append(seconds / rounds)
        self._spent += seconds
        plain = self.cost(0, kind)
        if plain is None:
            return
        if length == 0:
            tokens = 1.0
        elif tokens is None:
            tokens = expected_tokens(self.acceptance, length)
        worth = tokens * rounds * plain
        self._timed += seconds
        self._plain_worth += worth if length else seconds
        if length:
            # Time that drafts saved pays for later tries, but losses are not carried over.
            self._lost = max(0.0, self._lost + seconds - worth)
            self._losses = 0 if seconds < worth else self._losses + 1


def expected_tokens(acceptance: float, length: int) -> float:
    return sum(acceptance**n for n in range(length + 1))
