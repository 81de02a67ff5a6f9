"""Files of all kinds, damaged or malicious: each loads or ends in one line, soon, in little memory.

    nice -n 10 python -m experiments.benchmark files
    python -m experiments.benchmark files --scale=smoke --only='gguf,torch, zip'

A hundred thousand files, each made from its kind and its number: bombs written by hand first, then
small files of the kind with seeded damage to bytes, to lengths, to the documents inside. A process
reads them one after another. It is killed, and begun again behind the file, where one takes longer
than ten seconds. Finished parts lie in WORKDIR/files/parts, and the same command goes on with those
that are missing.
"""

import collections
import itertools
import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from experiments.benchmarks import _suite
from experiments.benchmarks._files_kinds import KINDS, numbers_of
from logitjax.storage import write_atomic

_SECONDS = 10.0
_MEGABYTES = 200.0
# Spread over the whole run: a few bombs, and others.
_SMOKE = 12
# Files of a part, which is what a kill of the whole can cost.
_PART = 500


def read_files(kind: str, numbers: list[int]) -> Iterator[dict[str, Any]]:
    """What came of files of a kind, one by one; those that had to be killed are `killed`."""
    left = collections.deque(numbers)
    # In memory where that is to be had: a hundred thousand small files.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    while left:
        with tempfile.TemporaryDirectory(dir=memory, prefix="logitjax-files-") as home:
            yield from _read_until_it_dies(kind, home, left)


def _read_until_it_dies(
    kind: str, home: str, left: collections.deque[int]
) -> Iterator[dict[str, Any]]:
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
                worker.kill()
                row = {"number": left.popleft(), "fate": fate, "text": fate, "ran": []}
                yield row | {"seconds": patience, "over": 0}
                return
            patience = 3 * _SECONDS
            left.popleft()
            yield json.loads(line)


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
        rows = _rows_of(kind, options)
        table.append(table_row(kind, rows))
        notes += [{"kind": kind} | row for row in rows if is_wrong(row)]
        print(json.dumps(table[-1]), flush=True)
    write_atomic(options.directory / "wrong.json", json.dumps(notes, indent=1) + "\n")
    worst = {key: max(row[key] for row in table) for key in list(table[0])[4:]}
    memory = "most memory over 1.3 x tensors, MB"
    bars = [
        _suite.Bar(name="files", value=sum(row["files"] for row in table), limit=1, sense=">="),
        _suite.Bar(name="neither loaded nor one line", value=worst["anything else"], limit=0),
        _suite.Bar(name="slowest, s", value=worst["slowest, s"], limit=_SECONDS),
        _suite.Bar(name=memory, value=worst[memory], limit=_MEGABYTES),
        _suite.Bar(name="code executed", value=worst["code executed"], limit=0),
    ]
    return _suite.Result(rows=table, bars=bars)


def _rows_of(kind: str, options: _suite.Options) -> list[dict[str, Any]]:
    """Rows of a kind from finished parts, and from files that are read now."""
    home = options.directory / "parts" / f"{options.scale}-{kind.replace(', ', '-')}"
    rows = [row for path in sorted(home.glob("*.json")) for row in json.loads(path.read_text())]
    known = {row["number"] for row in rows}
    count = _SMOKE if options.smoke else KINDS[kind].count
    fresh = read_files(kind, [n for n in numbers_of(kind, count) if n not in known])
    while part := list(itertools.islice(fresh, _PART)):
        write_atomic(home / f"{part[0]['number']:06d}.json", json.dumps(part) + "\n")
        rows += part
    return rows


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a file did what none may."""
    late, large = row["seconds"] > _SECONDS, row["over"] > _MEGABYTES * 1e6
    return row["fate"] not in ("loaded", "error") or bool(row["ran"]) or late or large
