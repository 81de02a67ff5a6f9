"""Decoding by rounds of drafted tokens, as many at a time as pay."""

import dataclasses
import time
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from logitjax.decoding._draft_control import DraftControl
from logitjax.decoding._engine import Engine
from logitjax.decoding._step import Emitted

# So many chunks at once while drafting does not pay: each look of the host takes its time.
_STRETCH = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting:
    """Counts of drafted and accepted tokens in a call of `generate`.

    Attributes:
        rounds: int32 ``[rows]``, speculative rounds that a row took part in.
        tested: int32 ``[rows]``, drafted tokens that were compared.
        accepted: int32 ``[rows]``, those that were accepted.
        calls: (draft length, rounds, seconds) of every call in order, 0 for plain steps.
        speedup: measured, by the control's timing of plain steps; None before it has any.
        predicted: what acceptance and costs predict for the length that was used most.
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


class Rounds:
    """Calls of an engine whose length a control chooses, timed."""

    def __init__(self, engine: Engine, control: DraftControl, *, chunk: int, watched: bool):
        self._engine = engine
        self._control = control
        self._chunk = chunk
        self._stretch = 1 if watched else _STRETCH
        self._kind: Hashable = (engine.slots, engine.max_length, chunk)
        self.calls: list[tuple[int, int, float]] = []
        self.stats = np.zeros((3, engine.slots), np.int32)

    def advance(self) -> Emitted:
        length = self._control.choose(self._kind)
        start = time.perf_counter()
        steps = self._chunk
        if length == 0:
            drafts_are_known = self._control.cost(self._control.lengths[0], self._kind) is not None
            steps *= self._stretch if drafts_are_known else 1
            emitted = jax.block_until_ready(self._engine.decode_chunk(steps))
            # Rows may end before the chunk does.
            rounds = max(1, int(np.asarray(emitted.valid).sum(axis=1).max()))
            entries: dict[str, Any] = {}
        else:
            # About as many tokens as a chunk of plain steps.
            rounds = max(1, self._chunk // (length + 1))
            # Waited for: what is dispatched only would be timed as free.
            emitted, drafted = jax.block_until_ready(self._engine.speculate(length, rounds))
            stats = np.stack([drafted.rounds, drafted.tested, drafted.accepted])
            self.stats += stats
            rounds, part = int(stats[0].max()), max(1, int(stats[0].sum()))
            entries = {
                "tokens": int(np.asarray(emitted.valid).sum()) / part,
                "tested": int(stats[1].sum()),
                "accepted": int(stats[2].sum()),
            }
        seconds = time.perf_counter() - start
        self.calls.append((length, rounds, seconds))
        self._control.record(
            length, seconds=seconds, rounds=rounds, kind=self._kind, program=steps, **entries
        )
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
            speedup=self._control.speedup,
            predicted=1.0 if used == 0 else self._control.predicted(used, self._kind),
        )
