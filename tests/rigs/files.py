"""Damaged and malicious files of every kind: each loads or ends in one line, soon and cheaply.

    nice -n 10 python -m tests.rigs files
    python -m tests.rigs files --scale=smoke --only='gguf,torch, zip'

A hundred thousand files, each made from its kind and its number: bombs written by hand first, then
small files of the kind with seeded damage to bytes, to lengths, to the documents inside. A process
reads them one after another. It is killed, and begun again behind the file, where one takes two
CPU-minutes. Finished parts lie in WORKDIR/files/parts, and the same command goes on with those
that are missing.
"""

import collections
import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from experiments.shared import suite
from logitjax.storage import write_atomic
from tests.rigs._files_kinds import KINDS, numbers_of

_SECONDS = 10.0
_MEGABYTES = 200.0
# Spread over the whole run: a few bombs, and others.
_SMOKE = 12
# Files of a part, which is what a kill of the whole can cost.
_PART = 50
_ROUNDS = 20
_FILES = {"smoke": _SMOKE * len(KINDS), "full": 100_000}


def read_files(files: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Outcomes of files `(kind, number)`, one by one; those that had to be killed are `killed`."""
    left = collections.deque(files)
    # In memory where that is to be had: a hundred thousand small files.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    while left:
        with tempfile.TemporaryDirectory(dir=memory, prefix="logitjax-files-") as home:
            yield from _read_until_it_dies(home, left)


def _read_until_it_dies(
    home: str, left: collections.deque[tuple[str, int]]
) -> Iterator[dict[str, Any]]:
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.rigs._files_worker", home],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    last = ""
    with worker, cast(IO[str], worker.stdin) as asked, cast(IO[str], worker.stdout) as answers:
        while left and worker.poll() is None:
            kind, number = left[0]
            # The first of a kind takes as long as imports and the making of bombs.
            patience = 12 * _SECONDS if kind == last else 300.0
            asked.write(json.dumps([kind, number]) + "\n")
            asked.flush()
            ready = _answers(worker.pid, answers, patience)
            line = answers.readline() if ready else ""
            left.popleft()
            if not line:
                worker.kill()
                fate = "died" if ready else "killed"
                row = {"kind": kind, "number": number, "fate": fate, "text": fate, "ran": []}
                yield row | {"seconds": patience, "over": 0}
                return
            last = kind
            yield json.loads(line)


def _answers(pid: int, answers: IO[str], patience: float) -> bool:
    """Whether there is something to read before a process has taken so many CPU-seconds."""
    # On a shared machine the clock says what others do: it counts twentyfold, for mere waits.
    begin, taken = time.monotonic(), _cpu_seconds(pid)
    while not select.select([answers], [], [], 1.0)[0]:
        waited = time.monotonic() - begin
        if _cpu_seconds(pid) - taken > patience or waited > 20 * patience:
            return False
    return True


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def table_row(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a kind in the benchmark's table."""
    fates = collections.Counter(row["fate"] for row in rows)
    return {
        "kind": kind,
        "files": len(rows),
        "loaded": fates["loaded"],
        "one-line errors": fates["error"],
        "anything else": len(rows) - fates["loaded"] - fates["error"],
        "slowest, CPU s": max(row["seconds"] for row in rows),
        "most memory over 1.3 x tensors, MB": max(row["over"] for row in rows) / 1e6,
        "code executed": sum(bool(row["ran"]) for row in rows),
    }


def run(options: suite.Options) -> suite.Result:
    """Runs the kinds asked for, all if none is named."""
    home = options.directory / "parts" / options.scale
    kinds = [kind for kind in KINDS if not options.only or kind in options.only]
    done = [row for path in sorted(home.glob("*.json")) for row in json.loads(path.read_text())]
    finished = {(row["kind"], row["number"]) for row in done}
    numbers = {
        kind: numbers_of(kind, _SMOKE if options.smoke else KINDS[kind].count) for kind in kinds
    }
    # In rounds of a twentieth of each kind, so that a run that was ended has seen them all.
    files = [
        (kind, number)
        for turn in range(_ROUNDS)
        for kind in kinds
        for number in numbers[kind][_share(numbers[kind], turn) : _share(numbers[kind], turn + 1)]
    ]
    fresh = read_files([file for file in files if file not in finished])
    # Ended by hand, it reports what it has read.
    with contextlib.suppress(KeyboardInterrupt):
        for kind, rows in itertools.groupby(fresh, key=lambda row: row["kind"]):
            while part := list(itertools.islice(rows, _PART)):
                name = f"{kind.replace(', ', '-').replace(' ', '-')}-{part[0]['number']:06d}.json"
                write_atomic(home / name, json.dumps(part) + "\n")
                done += part
            print(f"{kind}: {sum(row['kind'] == kind for row in done)} files", flush=True)
    asked = set(files)
    return report([row for row in done if (row["kind"], row["number"]) in asked], options)


def _share(numbers: list[int], turn: int) -> int:
    return len(numbers) * turn // _ROUNDS


def report(rows: list[dict[str, Any]], options: suite.Options) -> suite.Result:
    """The table and the bars, and the files that did what none may in `wrong.json`."""
    wrong = [row for row in rows if is_wrong(row)]
    write_atomic(options.directory / "wrong.json", json.dumps(wrong, indent=1) + "\n")
    # Of an earlier run they come in another order.
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    table = [table_row(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds]
    worst = {key: max(row[key] for row in table) for key in list(table[0])[4:]}
    memory = "most memory over 1.3 x tensors, MB"
    bars = [
        suite.at_least("files", len(rows), _FILES[options.scale]),
        suite.at_most("neither loaded nor one line", worst["anything else"], 0),
        suite.at_most("slowest, CPU s", worst["slowest, CPU s"], _SECONDS),
        suite.at_most(memory, worst[memory], _MEGABYTES),
        suite.at_most("code executed", worst["code executed"], 0),
    ]
    return suite.Result(rows=table, bars=bars)


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a file did what none may."""
    late, large = row["seconds"] > _SECONDS, row["over"] > _MEGABYTES * 1e6
    return row["fate"] not in ("loaded", "error") or bool(row["ran"]) or late or large
