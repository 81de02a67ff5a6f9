"""Accounting of a run's wall-clock time over all its starts."""

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from logitjax.storage import progress, write_atomic

# Parts with the verbs of their activities; an activity with another verb is `other`.
_VERBS = {
    "start-up": ("starting", "restoring"),
    "compilation": ("compiling",),
    "step": ("taking", "step"),
    "data": ("fetching", "packing", "reading", "waiting"),
    "preparation": ("loading", "pruning"),
    "save": ("saving",),
    "evaluation": ("evaluating", "scoring"),
}
_KINDS = {verb: kind for kind, verbs in _VERBS.items() for verb in verbs}
_FLUSH_SECONDS = 2.0
_FROM, _STEP = re.compile(r"training from step (\d+)"), re.compile(r"(?:taking )?step (\d+)")
_FILE = "goodput.jsonl"


@dataclasses.dataclass(frozen=True)
class Goodput:
    """The time of a run, recorded in its folder over all its starts."""

    folder: epath.Path

    @contextlib.contextmanager
    def account(self, begin: float | None = None) -> Iterator[None]:
        """Record what each second of this start is spent on, as reported to `progress`.

        The start began now, or at `begin`: imports are part of a process's start. A killed process
        loses at most the last two seconds of its record; they count as lost.
        """
        folder = self.folder
        begin = last = written = begin or time.time()
        seconds: dict[str, float] = {}
        steps: dict[str, int] = {}
        doing, done = "starting", False
        remote = "://" in str(folder)

        def note(now: float) -> None:
            nonlocal last
            kind = _KINDS.get(doing.partition(" ")[0], "other")
            seconds[kind] = seconds.get(kind, 0.0) + now - last
            last = now

        def write() -> None:
            nonlocal written
            written = last
            record = {"begin": begin, "end": last, "seconds": seconds, "done": done}
            line = json.dumps(record | steps) + "\n"
            # An object store cannot append, and is slow: one record per start.
            if remote:
                write_atomic(folder / "goodput" / f"{begin:.0f}.jsonl", line)
                return
            with (folder / _FILE).open("a") as file:
                # A kill may have left half a line before.
                file.write("\n" + line)

        def hear(phase: str) -> None:
            nonlocal doing
            note(time.time())
            doing = phase or doing
            if match := _FROM.match(doing):
                steps.setdefault("first", int(match[1]))
                steps["step"] = int(match[1])
            elif match := _STEP.match(doing):
                steps["step"] = int(match[1]) - 1
            if last - written > (30 * _FLUSH_SECONDS if remote else _FLUSH_SECONDS):
                write()

        folder.mkdir(parents=True, exist_ok=True)
        progress.listener = hear
        try:
            yield
            done = True
        finally:
            progress.listener = None
            note(time.time())
            write()

    def summary(self) -> dict[str, Any]:
        """Split the wall-clock time into parts, in seconds, that add up to `wall`.

        `step` is time in steps that counted, the goodput. Steps lost to a kill are `redone`.
        Between two starts nothing ran or was recorded: `down`. Time between the end of a run and a
        later start that finds it finished is ignored. The other parts are `start-up` (restoring
        included), `preparation` (models), `data` (packing, teachers' reading, waiting for batches),
        `compilation` (with first steps), `save`, `evaluation` and `other`.

        Returns:
            `wall`, `goodput` (the share of it), `starts`, and `seconds` by part.

        Raises:
            ValueError: The folder has no record.
        """
        files = [self.folder / _FILE, *sorted((self.folder / "goodput").glob("*.jsonl"))]
        starts: dict[float, Mapping[str, Any]] = {}
        for line in b"".join(path.read_bytes() for path in files if path.exists()).splitlines():
            # The last line of a start includes all before it; a kill may have truncated it.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                starts[record["begin"]] = record
        if not starts:
            raise ValueError(f"{self.folder}: expected {_FILE}, which a run writes, got none")
        records = [starts[begin] for begin in sorted(starts)]
        seconds: dict[str, float] = {}
        idle = 0.0
        for record, after in zip(records, [*records[1:], None]):
            local = dict(record["seconds"])
            if after is not None:
                gap = after["begin"] - record["end"]
                idle += gap if record.get("done") else 0.0
                local["down"] = 0.0 if record.get("done") else gap
                done, first = record.get("step", 0), record.get("first", 0)
                lost = max(0, done - after.get("first", done))
                local["redone"] = local.get("step", 0.0) * min(1.0, lost / max(1, done - first))
                local["step"] = local.get("step", 0.0) - local["redone"]
            for kind, part in local.items():
                seconds[kind] = seconds.get(kind, 0.0) + part
        wall = records[-1]["end"] - records[0]["begin"] - idle
        share = seconds.get("step", 0.0) / wall if wall else 0.0
        return {"wall": wall, "goodput": share, "starts": len(records), "seconds": seconds}
