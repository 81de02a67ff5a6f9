"""Accounts of each key: budgets, rates, and a log of what was revealed."""

import collections
import dataclasses
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from absl import logging

from logitjax.leakage import Ledger
from logitjax.serving._errors import ApiError
from logitjax.serving._keys import Key


@dataclasses.dataclass
class Spent:
    """Answers and tokens so far, including those in progress."""

    queries: int = 0
    tokens: int = 0
    nats: float = 0.0

    def add(self, more: "Spent") -> None:
        for name, amount in vars(more).items():
            setattr(self, name, getattr(self, name) + amount)


class Rate:
    """A rate per minute; a full minute's amount may be taken at once."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._per_second = per_minute / 60
        self._most = self._left = float(per_minute)
        self._clock, self._at = clock, clock()

    def wait(self, amount: int) -> float:
        """Seconds until this amount may be taken."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        # More than a minute's amount waits for a full bucket and leaves it in debt.
        missing = min(amount, self._most) - self._left
        return max(0.0, missing / self._per_second) if self._per_second else float("inf")

    def take(self, amount: int) -> None:
        self._left -= amount


class Accounts:
    """Remaining budgets of all keys; with a log, they are restored after a restart."""

    def __init__(
        self,
        keys: Sequence[Key],
        log: str | None = None,
        context_nats: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.ledger = Ledger(context_nats)
        self._spent: dict[str, Spent] = collections.defaultdict(Spent)
        self._rates: dict[str, dict[str, Rate]] = collections.defaultdict(dict)
        for key in keys:
            limits = {"queries": key.queries_per_minute, "tokens": key.tokens_per_minute}
            rates = {name: Rate(most, clock) for name, most in limits.items() if most is not None}
            self._rates[key.name] = rates
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        if log is not None:
            self._sum_up(Path(log))
            # Opened here, so that a server that cannot log does not start.
            file = open(log, "a")  # noqa: SIM115 (the thread closes it)
            self._writer = threading.Thread(target=self._write, args=(file,), daemon=True)
            self._writer.start()

    def spent(self, key: Key) -> Spent:
        return self._spent[key.name]

    def reserve(
        self, key: Key, *, queries: int, tokens: int, nats: float = 0.0
    ) -> tuple[Key, Spent]:
        """Reserve the most that a request may use; what it does not use is returned."""
        spent, expected = self._spent[key.name], Spent(queries, tokens, nats)
        for name, more in vars(expected).items():
            most, used = getattr(key, name), getattr(spent, name)
            if most is not None and used + more > most:
                left = f"{used:.10g} are used, {more:.10g} more requested; it is not renewed"
                message = f"the budget of this key is {most:.10g} {name}: {left}"
                raise ApiError(429, message, code="insufficient_quota")
        rates = self._rates[key.name]
        waits = {name: rate.wait(getattr(expected, name)) for name, rate in rates.items()}
        slowest = max(waits, key=lambda name: waits[name], default=None)
        if slowest is not None and waits[slowest] > 0:
            # A rate of zero waits forever.
            seconds = 3600 if waits[slowest] >= 3600 else int(waits[slowest]) + 1
            message = f"too many {slowest} a minute for this key"
            after = {"Retry-After": str(seconds)}
            raise ApiError(429, message, code="rate_limit_exceeded", headers=after)
        self._take(key, expected)
        return key, expected

    def settle(
        self,
        reservation: tuple[Key, Spent],
        *,
        tokens: int,
        record: dict[str, Any] | None,
        contexts: Mapping[str, float] | None = None,
    ) -> None:
        """Return what was not used (everything, without a record), and log what was revealed."""
        (key, stored), nats = reservation, sum((contexts or {}).values())
        back = stored.queries if record is None else 0
        self._take(key, Spent(-back, tokens - stored.tokens, nats - stored.nats))
        if record is not None and self._writer is not None:
            entry = {"time": round(time.time(), 3), "key": key.name}
            entry |= {"queries": stored.queries, "tokens": tokens}
            entry |= {"nats": nats, "contexts": contexts} if contexts else {}
            self._lines.put(json.dumps(entry | record))

    def _take(self, key: Key, more: Spent) -> None:
        self._spent[key.name].add(more)
        for name, rate in self._rates[key.name].items():
            rate.take(getattr(more, name))

    def close(self) -> None:
        if self._writer is not None:
            self._lines.put(None)
            self._writer.join(timeout=10)

    def _sum_up(self, path: Path) -> None:
        if not path.exists():
            return
        content = path.read_bytes()
        # A line that the last process did not finish is ignored.
        content = content[: content.rfind(b"\n") + 1]
        with path.open("r+b") as file:
            file.truncate(len(content))
        for number, line in enumerate(content.splitlines(), 1):
            try:
                entry = json.loads(line)
                spent = Spent(entry["queries"], entry["tokens"], entry.get("nats", 0.0))
                self._spent[entry["key"]].add(spent)
                for context, nats in entry.get("contexts", {}).items():
                    self.ledger.add(context, nats)
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: expected a line of an audit log") from None

    def _write(self, file: TextIO) -> None:
        # In a thread of its own: a slow disk must not block the event loop.
        with file:
            while (line := self._lines.get()) is not None:
                try:
                    file.write(line + "\n")
                    file.flush()
                except OSError:
                    logging.exception("the audit log cannot be written")
