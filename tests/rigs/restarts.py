"""A pod is killed and started again on an object store: is it refused, do bits differ?

Every start is process 1 of a process namespace of its own, as a container's is, on a host that is
called the same; the emulated store refuses writes whose generation does not match.
"""

import concurrent.futures
import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from experiments.shared import suite
from experiments.shared.suite import ROOT
from tests.rigs import _jobs
from tests.rigs._object_store import Store

_STEPS = {"smoke": 20, "full": 300}
_SECONDS_A_STEP = 0.4
# Longer than a holder takes to write its lock anew, which is what another start waits for.
_HOLD_SECONDS = 15.0


def _in_a_pod() -> list[str]:
    """The prefix that makes a command process 1; empty if only the administrator may."""
    words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"]).returncode:
        return []
    return words


def _command(job: str, *words: str) -> list[str]:
    return [*_in_a_pod(), *_jobs.module(f"tests.rigs.{job}", *words)]


def _lane(
    store: Store, directory: Path, number: int, *, kills: int, most: float, steps: int
) -> dict[str, Any]:
    """Runs, one after another, that are killed so often; each goes on until it has ended."""
    draw = random.Random(time.time_ns() + number)
    # The last lane has no launcher: a restart waits for the lock to become stale.
    variables = store.variables() | {"LOGITJAX_RUN": f"lane-{number}" if number else ""}
    done, refused, runs, digests = 0, 0, 0, set()
    while done < kills or runs == 0:
        log = directory / f"lane-{number}-run-{runs}.log"
        workdir = f"gs://bucket/lane-{number}/run-{runs}"
        job = _command("_faults_job", workdir, str(steps), str(_SECONDS_A_STEP))
        while True:
            process = _jobs.start(job, log, **variables)
            try:
                limit = draw.uniform(0.0, most) if done < kills else 600.0
                status = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
                continue
            refused += status != 0
            break
        digests.add(_jobs.digest(log))
        runs += 1
    return {
        "lane": number,
        "who is known": "by LOGITJAX_RUN" if number else "by nothing",
        "kills": done,
        "runs": runs,
        "starts that failed": refused,
        "digests": sorted(digests),
    }


def _winners(store: Store, directory: Path, rounds: int) -> list[int]:
    """By round how many of two processes got the workdir."""
    workdirs = [f"gs://bucket/round-{n}" for n in range(rounds)]
    command = _command("_starters_job", str(_HOLD_SECONDS), *workdirs)
    options: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, **store.variables(), "LOGITJAX_RUN": ""}
    with (directory / "starters.log").open("ab") as log:
        options |= {"cwd": ROOT, "env": environment, "stderr": log}
        pair = [subprocess.Popen(command, **options) for _ in range(2)]
    for process in pair:
        assert process.stdout is not None
        process.stdout.readline()
    for process in pair:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    wins = [json.loads(process.communicate(timeout=300)[0]) for process in pair]
    return [sum(pair) for pair in zip(*wins, strict=True)]


def run(options: suite.Options) -> suite.Result:
    """Lanes of runs side by side, then pairs of starts."""
    smoke = options.smoke
    lanes, kills, most, rounds = (2, 2, 12.0, 5) if smoke else (5, 10, 120.0, 100)
    directory, steps = _jobs.fresh(options), _STEPS[options.scale]
    with contextlib.closing(Store()) as store:
        peace = directory / "peace.log"
        job = _command("_faults_job", "gs://bucket/peace", str(steps), "0")
        _jobs.finish(job, peace, **store.variables())
        expected = _jobs.digest(peace)
        lane = functools.partial(_lane, store, directory, kills=kills, most=most, steps=steps)
        with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
            rows = list(pool.map(lane, range(lanes)))
        winners: list[int] = []
        while len(winners) < rounds:
            winners += _winners(store, directory, min(20, rounds - len(winners)))
    for row in rows:
        row["equal to an uninterrupted run"] = row.pop("digests") == [expected]
    pods = "in pods of their own" if _in_a_pod() else "not in process namespaces"
    failed = suite.total(rows, "starts that failed")
    other = len(rows) - suite.total(rows, "equal to an uninterrupted run")
    bars = [
        suite.at_least(f"kills, {pods}", suite.total(rows, "kills"), lanes * kills),
        suite.at_most("starts that were refused or failed", failed, 0),
        suite.at_most("lanes that ended with other bits", other, 0),
        suite.at_least("pairs of starts of which exactly one won", winners.count(1), rounds),
    ]
    return suite.Result(rows=rows, bars=bars)
