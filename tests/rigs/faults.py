"""A run is killed at random moments, many times: is a checkpoint lost, do bits differ?"""

import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

from absl import logging

from experiments.shared import suite
from tests.rigs import _faults_job, _jobs

_STEP = re.compile(r"\bstep \d+:")


def _command(workdir: Path, steps: int) -> list[str]:
    return _jobs.module("tests.rigs._faults_job", str(workdir), str(steps))


def _lines(workdir: Path) -> int:
    metrics = workdir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _complete(workdir: Path) -> list[int]:
    """Steps of the checkpoints that have their final name."""
    found = (workdir / "checkpoints").glob("[0-9]*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def _life(workdir: Path, steps: int, draw: random.Random) -> dict[str, Any] | None:
    """One start that ends with SIGKILL; None if it came to its end before."""
    before, log = _complete(workdir), workdir / "log"
    # What this start says, not metrics.jsonl: that holds the lines of earlier starts too.
    log.unlink(missing_ok=True)
    process = _jobs.start(_command(workdir, steps), log)
    newest, told = (before[-1] if before else 0), None
    # Into the middle of starting, restoring, training or saving.
    patience = draw.uniform(0.0, 3.0) if draw.random() < 0.2 else None
    deadline = time.monotonic() + (120 if patience is None else patience)
    # Counted in steps, so that a busy machine comes to its checkpoints too.
    wanted = draw.randint(1, 3 * _faults_job.EVERY)
    moved = None
    while process.poll() is None and time.monotonic() < deadline:
        if patience is None and moved is None and len(_STEP.findall(_jobs.said(log))) >= wanted:
            moved = time.monotonic() + draw.uniform(0.0, 0.3)
        if moved is not None and time.monotonic() >= moved:
            break
        time.sleep(0.001)
    ended = process.poll()
    process.kill()
    process.wait()
    said = _jobs.said(log)
    if ended not in (None, 0):
        raise RuntimeError(f"the run failed by itself: {said[-2000:]}")
    for reason in re.findall(r"checkpoint \d+ in .* is corrupt: .*", said):
        logging.warning("%s", reason)
    if found := re.search(r"resuming at step (\d+)", said):
        told = int(found[1])
    if ended == 0:
        return None
    after, reached = _complete(workdir), _lines(workdir)
    return {
        "training": _STEP.search(said) is not None,
        "checkpointed": bool(before or after),
        # It said which one it took, and took another than the newest that there was.
        "lost": int(told is not None and told != newest) + int(bool(newest) and not after),
        "steps to do again": max(0, reached - (after[-1] if after else 0)),
        "corrupt": len(list((workdir / "checkpoints").glob("corrupt_*"))),
    }


def run(options: suite.Options) -> suite.Result:
    """Kills until there were enough; each run goes on until it ends, and is compared with peace."""
    wanted, steps = (10, 40) if options.smoke else (200, 400)
    directory = _jobs.fresh(options)
    peace = directory / "peace.log"
    _jobs.finish(_command(directory / "peace", steps), peace)
    expected = _jobs.digest(peace)
    draw = random.Random(time.time_ns())
    kills: list[dict[str, Any]] = []
    rows = []
    while len(kills) < wanted:
        workdir = directory / f"run-{len(rows)}"
        workdir.mkdir()
        mine: list[dict[str, Any]] = []
        while len(kills) + len(mine) < wanted:
            life = _life(workdir, steps, draw)
            if life is None:
                break
            mine.append(life)
        _jobs.finish(_command(workdir, steps), workdir / "log")
        kills += mine
        rows.append(
            {
                "run": len(rows),
                "kills": len(mine),
                "after a step": suite.total(mine, "training"),
                "with a checkpoint": suite.total(mine, "checkpointed"),
                "lost checkpoints": suite.total(mine, "lost"),
                "unreadable checkpoints": max((life["corrupt"] for life in mine), default=0),
                "most steps to do again": max((x["steps to do again"] for x in mine), default=0),
                "equal to a run in peace": _jobs.digest(workdir / "log") == expected,
            }
        )
        shutil.rmtree(workdir)
    lost = suite.total(rows, "lost checkpoints", "unreadable checkpoints")
    other = len(rows) - suite.total(rows, "equal to a run in peace")
    # What is being written when the process dies is not there yet.
    again, every = max(row["most steps to do again"] for row in rows), _faults_job.EVERY
    trained, checkpointed = suite.total(kills, "training"), suite.total(kills, "checkpointed")
    bars = [
        suite.at_least("kills", len(kills), wanted),
        # One in five is left to chance, and may come while Python is starting.
        suite.at_least("kills after a step of their own start", trained, wanted // 2),
        suite.at_least("kills that had a checkpoint to lose", checkpointed, wanted // 2),
        suite.at_most("lost or unreadable checkpoints", lost, 0),
        suite.at_most("runs that ended with other bits", other, 0),
        suite.at_most(f"most steps to do again, of {every} between checkpoints", again, 2 * every),
    ]
    return suite.Result(rows=rows, bars=bars)
