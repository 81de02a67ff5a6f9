"""Decoding by rounds of drafted tokens, as many at a time as are worthwhile."""

import collections
import dataclasses
import time
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from logitjax.decoding._draft_control import DraftControl
from logitjax.decoding._step import Emitted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting:
    """Counts of drafted and accepted tokens in a call of `generate`.

    Attributes:
        rounds: int64 ``[rows]``, speculative rounds that a row took part in.
        tested: int64 ``[rows]``, drafted tokens that were compared.
        accepted: int64 ``[rows]``, those that were accepted.
        calls: (draft length, rounds, seconds) of every call in order, 0 for plain steps.
        speedup: measured against the control's timing of plain steps; None until it has one.
        predicted: speed-up predicted from acceptance and costs for the most used length.
    """

    rounds: np.ndarray
    tested: np.ndarray
    accepted: np.ndarray
    calls: tuple[tuple[int, int, float], ...]
    speedup: float | None = None
    predicted: float | None = None

    @property
    def acceptance(self) -> float:
        """Share of the compared drafts that were accepted; nan without any."""
        tested = int(self.tested.sum())
        return float(self.accepted.sum()) / tested if tested else float("nan")

    @property
    def length(self) -> float:
        """Tokens emitted per verification, the model's own one included; nan without any."""
        rounds = int(self.rounds.sum())
        return 1 + float(self.accepted.sum()) / rounds if rounds else float("nan")


class Rounds:
    """Timed calls of an engine with the draft length that a control chooses."""

    def __init__(self, engine: Any, control: DraftControl, *, rests: bool):
        self._engine, self.control, self._rests = engine, control, rests
        self._kind: Hashable = (engine.slots, engine.max_length)
        # A server's engine never stops calling.
        self.calls: collections.deque[tuple[int, int, float]] = collections.deque(maxlen=4096)
        self.stats = np.zeros((3, engine.slots), np.int64)
        self._last: Hashable = None

    def rounds(self, length: int, steps: int) -> int:
        """About as many tokens as a chunk of plain steps; drafts from the text may be missing."""
        return steps if self._rests else max(1, steps // (length + 1))

    def advance(self, steps: int, stretch: int = 1) -> Emitted:
        control, kind = self.control, (*self._kind, steps)
        self._last = kind
        length = control.choose(kind)
        start, plain = time.perf_counter(), 0
        entries: dict[str, Any] = {}
        if length == 0:
            drafts_are_known = control.cost(control.lengths[0], kind) is not None
            steps *= stretch if drafts_are_known else 1
            emitted = jax.block_until_ready(self._engine.decode_chunk(steps))
            # Rows may end before the chunk does.
            rounds = max(1, int(np.asarray(emitted.valid).sum(axis=1).max()))
        else:
            # Waited for: work that was only dispatched would be timed as free.
            emitted, drafted = jax.block_until_ready(
                self._engine.speculate(length, self.rounds(length, steps))
            )
            stats = np.stack([drafted.rounds, drafted.tested, drafted.accepted])
            self.stats += stats
            rounds, plain = int(stats[0].max()), int(np.max(drafted.plain))
            tokens = int(np.asarray(emitted.valid).sum()) - int(np.sum(drafted.plain))
            entries = {
                "tokens": tokens / max(1, int(stats[0].sum())),
                "tested": int(stats[1].sum()),
                "accepted": int(stats[2].sum()),
            }
        seconds = time.perf_counter() - start
        self.calls.append((length, rounds, seconds))
        # Steps in which no row had a draft cost as much as plain ones.
        seconds = max(0.0, seconds - plain * (control.cost(0, kind) or 0.0))
        control.record(length, seconds=seconds, rounds=rounds, kind=kind, program=steps, **entries)
        return emitted

    def drafting(self) -> Drafting:
        counts: dict[int, int] = {}
        for length, rounds, _ in self.calls:
            counts[length] = counts.get(length, 0) + rounds * (length + 1)
        used = max(counts, key=lambda length: counts[length], default=0)
        return Drafting(
            rounds=self.stats[0],
            tested=self.stats[1],
            accepted=self.stats[2],
            calls=tuple(self.calls),
            speedup=self.control.speedup,
            predicted=1.0 if used == 0 else self.control.predicted(used, self._last),
        )
