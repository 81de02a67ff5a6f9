"""Files of all kinds, damaged or malicious: each loads or ends in one line, soon, in little memory.

    nice -n 10 python -m experiments.benchmark files
    python -m experiments.benchmark files --scale=smoke --only='gguf,torch, zip'

A hundred thousand files, each made from its kind and its number: bombs written by hand first, then
small files of the kind with seeded damage to bytes, to lengths, to the documents inside. A process
reads them one after another. It is killed, and begun again behind the file, where one takes longer
than ten seconds.
"""

import collections
import json
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, cast

from experiments.benchmarks import _suite
from experiments.benchmarks._files_kinds import KINDS, numbers_of

_SECONDS = 10.0
_MEGABYTES = 200.0
# Bombs of all kinds come first: the smoke scale has them and about as many others.
_SMOKE = 12


def read_files(kind: str, numbers: list[int]) -> list[dict[str, Any]]:
    """What came of files of a kind; those that had to be killed are `killed`."""
    rows: list[dict[str, Any]] = []
    left = collections.deque(numbers)
    # In memory where that is to be had: a hundred thousand small files.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    while left:
        with tempfile.TemporaryDirectory(dir=memory, prefix="logitjax-files-") as home:
            _read_until_it_dies(kind, home, left, rows)
    return rows


def _read_until_it_dies(
    kind: str, home: str, left: collections.deque[int], rows: list[dict[str, Any]]
) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-m", "experiments.benchmarks._files_worker", kind, home],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with worker, cast(IO[str], worker.stdin) as asked, cast(IO[str], worker.stdout) as answers:
        # The first answer takes as long as Python's imports and the making of bombs.
        patience = 300.0
        while left and worker.poll() is None:
            asked.write(f"{left[0]}\n")
            asked.flush()
            ready, _, _ = select.select([answers], [], [], patience)
            line = answers.readline() if ready else ""
            if not line:
                fate = "died" if ready else "killed"
                rows.append({"number": left.popleft(), "fate": fate, "text": fate, "ran": []})
                rows[-1] |= {"seconds": patience, "over": 0}
                worker.kill()
                return
            patience = 3 * _SECONDS
            rows.append(json.loads(line))
            left.popleft()


def table_row(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a kind in the benchmark's table."""
    fates = collections.Counter(row["fate"] for row in rows)
    return {
        "kind": kind,
        "files": len(rows),
        "loaded": fates["loaded"],
        "one-line errors": fates["error"],
        "anything else": len(rows) - fates["loaded"] - fates["error"],
        "slowest, s": max(row["seconds"] for row in rows),
        "most memory over 1.3 x tensors, MB": max(row["over"] for row in rows) / 1e6,
        "code executed": sum(bool(row["ran"]) for row in rows),
    }


def run(options: _suite.Options) -> _suite.Result:
    """Runs the kinds asked for, all if none is named."""
    wanted = [kind for kind in KINDS if not options.only or kind in options.only]
    table, notes = [], []
    for kind in wanted:
        count = _SMOKE if options.smoke else KINDS[kind].count
        rows = read_files(kind, numbers_of(kind, count))
        table.append(table_row(kind, rows))
        notes += [{"kind": kind} | row for row in rows if is_wrong(row)]
        print(json.dumps(table[-1]), flush=True)
    options.directory.mkdir(parents=True, exist_ok=True)
    (options.directory / "wrong.json").write_text(json.dumps(notes, indent=1) + "\n")
    worst = {key: max(row[key] for row in table) for key in list(table[0])[4:]}
    bars = [
        _suite.Bar(name="files", value=sum(row["files"] for row in table), limit=1, sense=">="),
        _suite.Bar(name="neither loaded nor one line", value=worst["anything else"], limit=0),
        _suite.Bar(name="slowest, s", value=worst["slowest, s"], limit=_SECONDS),
        _suite.Bar(
            name="most memory over 1.3 x tensors, MB",
            value=worst["most memory over 1.3 x tensors, MB"],
            limit=_MEGABYTES,
        ),
        _suite.Bar(name="code executed", value=worst["code executed"], limit=0),
    ]
    return _suite.Result(rows=table, bars=bars)


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a file did what none may."""
    late, large = row["seconds"] > _SECONDS, row["over"] > _MEGABYTES * 1e6
    return row["fate"] not in ("loaded", "error") or bool(row["ran"]) or late or large
