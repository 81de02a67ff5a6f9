"""A pod is killed and started again on an object store: is it refused, do bits differ?

Every start is process 1 of a process namespace of its own, as a container's is, on a host that is
called the same; the emulated store refuses writes whose generation does not match.
"""

import concurrent.futures
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.shared import suite
from tests.rigs._object_store import Store

_ROOT = Path(__file__).parents[2]
_STEPS = {"smoke": 20, "full": 300}
_SECONDS_A_STEP = 0.4
# Longer than a holder takes to write its lock anew, which is what another start waits for.
_HOLD_SECONDS = 15.0


def _in_a_pod() -> list[str]:
    """What makes a command process 1; nothing where only the administrator may."""
    words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"]).returncode:
        return []
    return words


def _start(store: Store, log: Path, job: str, *words: str, **variables: str) -> subprocess.Popen:
    command = [*_in_a_pod(), sys.executable, "-m", f"tests.rigs.{job}", *words]
    environment = {**os.environ, **store.variables(), **variables}
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if job == "_starters_job" else file,
            stderr=file,
            text=True,
        )


def _digest(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("digest ")), "none")


def _lane(
    number: int, store: Store, directory: Path, *, kills: int, most: float, steps: int
) -> dict[str, Any]:
    """Runs, one after another, that are killed so often; each goes on until it has ended."""
    draw = random.Random(time.time_ns() + number)
    words = ("_faults_job", f"gs://bucket/lane-{number}/run-%d", str(steps), str(_SECONDS_A_STEP))
    # The last lane has no launcher: a restart waits for the lock to become stale.
    token = {"LOGITJAX_RUN": f"lane-{number}"} if number else {"LOGITJAX_RUN": ""}
    done, refused, runs, digests = 0, 0, 0, set()
    while done < kills or runs == 0:
        log = directory / f"lane-{number}-run-{runs}.log"
        job = [words[0], words[1] % runs, *words[2:]]
        while True:
            process = _start(store, log, *job, **token)
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
        digests.add(_digest(log))
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
    log = directory / "starters.log"
    workdirs = [f"gs://bucket/round-{n}" for n in range(rounds)]
    pair = [
        _start(store, log, "_starters_job", str(_HOLD_SECONDS), *workdirs, LOGITJAX_RUN="")
        for _ in range(2)
    ]
    for process in pair:
        assert process.stdout is not None
        process.stdout.readline()
    for process in pair:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    held = [json.loads(process.communicate(timeout=300)[0]) for process in pair]
    return [sum(pair) for pair in zip(*held, strict=True)]


def run(options: suite.Options) -> suite.Result:
    """Lanes of runs side by side, then pairs of starts."""
    smoke = options.smoke
    lanes, kills, most, rounds = (2, 2, 12.0, 5) if smoke else (5, 10, 120.0, 100)
    directory = options.directory.resolve() / f"run-{time.time_ns()}"
    directory.mkdir(parents=True)
    store = Store()
    steps = _STEPS[options.scale]
    try:
        peace = directory / "peace.log"
        job = ("_faults_job", "gs://bucket/peace", str(steps), "0")
        if _start(store, peace, *job).wait():
            raise RuntimeError(peace.read_text(errors="replace")[-2000:])
        expected = _digest(peace)
        with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
            futures = [
                pool.submit(_lane, number, store, directory, kills=kills, most=most, steps=steps)
                for number in range(lanes)
            ]
            rows = [future.result() for future in futures]
        winners: list[int] = []
        while len(winners) < rounds:
            winners += _winners(store, directory, min(20, rounds - len(winners)))
    finally:
        store.close()
    for row in rows:
        row["equal to a run in peace"] = row.pop("digests") == [expected]
    pods = "in pods of their own" if _in_a_pod() else "not in process namespaces"
    bars = [
        suite.at_least(f"kills, {pods}", sum(row["kills"] for row in rows), lanes * kills),
        suite.at_most(
            "starts that were refused or failed", sum(row["starts that failed"] for row in rows), 0
        ),
        suite.at_most(
            "lanes that ended with other bits",
            sum(not row["equal to a run in peace"] for row in rows),
            0,
        ),
        suite.at_least(
            "pairs of starts of which exactly one won", sum(count == 1 for count in winners), rounds
        ),
    ]
    return suite.Result(rows=rows, bars=bars)
