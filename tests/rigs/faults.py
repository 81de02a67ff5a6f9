"""Runs are killed, their files damaged, their disks filled: is anything lost, wrong or unclear?

Each start is a fork of a process that has imported the library: it takes what the run takes. Kinds
of faults: `kill`; `flip` of a bit, `cut` of a file and `torn` (files of the newest checkpoint
emptied or cut, as after a power loss), each of a run that was killed; `full` disks; a `clock` that
jumps between starts; `two` runs in one folder. A run goes on until it ends, and has to have the
bits of an uninterrupted one. Faults are kept in `faults.jsonl`, so that an ended rig goes on.
`--only=loop,distill,unlearn,convert-head` runs the training loop, or a command on a tiny model.
"""

import collections
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib.backends.backend_agg  # noqa: F401

from experiments.benchmarks import unlearn
from experiments.shared import suite
from logitjax import commands
from logitjax.commands import convert_head, distill  # noqa: F401
from tests.rigs import _faults_job, _jobs

# A step of training, not a candidate that was judged after it.
_STEP, _FROM = re.compile(r"\bstep (\d+): (?!{)"), re.compile(r"resuming at step (\d+)")
_KINDS = ("kill", "flip", "cut", "torn", "full", "clock", "two")
_FULL = {"loop": 860, "distill": 140, "unlearn": 84, "convert-head": 84}
_DAY = 86_400.0
_SMALL_DISK, _LARGE_DISK = 24 << 10, 64 << 20


def _command(name: str, flags: str) -> Callable[[Path], None]:
    def start(folder: Path) -> None:
        words, text = flags.split(), folder.parent / "text.txt"
        if name == "unlearn":
            # The first start, which has no faults, teaches a model.
            words += unlearn.prepare(folder.parent, 0, smoke=True)
        else:
            if not text.exists():
                text.write_text("\n\n".join(f"paragraph {i} " + "word " * 60 for i in range(120)))
            words += [f"--data=text:{text}", "--seq_len=32", "--mesh=data:1"]
        sys.argv = ["logitjax", name, f"--out={folder}", *words]
        commands.main()

    return start


# What a start runs in a folder, and which files it makes; none where the log has a digest.
_Job = tuple[Callable[[Path], None], tuple[str, ...]]
_JOBS: dict[str, _Job] = {
    "loop": (lambda folder: _faults_job.main([str(folder), "40"]), ()),
    "distill": (
        _command(
            "distill",
            "--student=tiny --teacher=tiny:1 --batch_size=2 --cache_top_k=16 --steps=24"
            " --eval_rows=2 --eval_every=0 --checkpoint_every=5 --log_every=1",
        ),
        ("model/model.safetensors",),
    ),
    "unlearn": (
        _command("unlearn", "--steps=20 --check_every=5 --rounds=1"),
        ("report.md", "verdict.json", "assistant/*"),
    ),
    "convert-head": (
        _command(
            "convert-head",
            "--model=tiny --max_tokens=400 --held_out_tokens=100 --num_codes=16 --steps=40"
            " --batch_size=64",
        ),
        ("report.md", "head/*"),
    ),
}


class _Start:
    """A fork that runs a job; its log tells how far it is."""

    def __init__(self, job: _Job, folder: Path, log: Path, shift: float = 0.0):
        log.write_text("")
        self.log, self.status = log, None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            for number in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
            now = time.time
            time.time = lambda: now() + shift
            job[0](folder)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def until(self, reached: Callable[[], bool], seconds: float = 1800.0) -> int | None:
        end = time.monotonic() + seconds
        while self.poll() is None and not reached():
            if time.monotonic() > end:
                raise RuntimeError(
                    f"nothing for {seconds:g} s: {_jobs.output_of(self.log)[-2000:]}"
                )
            time.sleep(0.01)
        return self.status

    def end(self) -> int | None:
        return self.until(lambda: False)

    def pause(self) -> bool:
        """Stops a start until SIGCONT; False if it has ended."""
        os.kill(self.pid, signal.SIGSTOP)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        self.status = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        return self.status is None

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _damage(kind: str, folder: Path, draw: random.Random) -> list[Path]:
    inside = [path for newest in _complete(folder)[-1:] for path in sorted(newest.rglob("*"))]
    inside = [path for path in inside if path.is_file() and path.stat().st_size]
    others = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    others = [p for p in others if "checkpoints" not in p.parts and p.name not in ("lock", "log")]
    if kind == "torn":
        chosen = draw.sample(inside, min(len(inside), draw.randint(1, 4)))
    else:
        pool = inside if others == [] or (inside and draw.random() < 0.7) else others
        chosen = [draw.choice(pool)] if pool else []
    for path in chosen:
        content = bytearray(path.read_bytes())
        if kind == "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del content[draw.choice((0, draw.randrange(len(content)))) :]
        path.write_bytes(content)
    return chosen


def _complete(folder: Path) -> list[Path]:
    """Checkpoints, the newest last."""
    paths = [path for path in folder.rglob("checkpoints/*") if path.name.isdigit()]
    return sorted(paths, key=lambda path: int(path.name))


class _Run:
    def __init__(self, job: _Job, folder: Path, disk: Callable[[int], None], peace: str):
        self.job, self.folder, self.disk, self.peace = job, folder, disk, peace
        # Beside the disk that fills up.
        self.log = folder.parents[1] / f"{folder.parent.name}-{folder.name}.log"
        self._copies: dict[Path, bytes] = {}
        self._spoilt: set[Path] = set()
        self._readable: list[Path] = []

    def fault(self, kind: str, draw: random.Random) -> dict[str, Any]:
        """One start with a fault: its status, what was damaged after it, and what went wrong."""
        wrong: list[str] = []
        shift = draw.uniform(-30, 30) * _DAY if kind == "clock" else 0.0
        if kind == "full":
            self.disk(_SMALL_DISK + draw.randrange(1 << 16))
        start = _Start(self.job, self.folder, self.log, shift)
        # After so many steps, or once something new is saved: saves end long after their step.
        # A second start comes once the first is sure to have the folder.
        steps = draw.randint(int(kind == "two"), 2 * _faults_job.EVERY)
        before = _complete(self.folder)
        logged: Any = lambda: len(_STEP.findall(_jobs.output_of(self.log))) >= steps  # noqa: E731
        saved: Any = lambda: _complete(self.folder) != before  # noqa: E731
        status = start.until(draw.choice((logged, saved)))
        if kind == "two" and status is None:
            wrong += self._second(start)
            status = start.poll()
        if kind == "full":
            status = start.end()
            self.disk(_LARGE_DISK)
        elif status is None:
            time.sleep(draw.uniform(0.0, 0.05))
            start.kill()
            status = start.status
        wrong += self._look(status, kind)
        if _STEP.search(_jobs.output_of(self.log)):
            # Else it was killed before it read what the fault before this one damaged.
            self._copies, self._spoilt = {}, set()
        chosen: list[Path] = []
        if kind in ("flip", "cut", "torn") and status == -signal.SIGKILL:
            copies = {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}
            chosen = _damage(kind, self.folder, draw)
            self._copies = {path: copies[path] for path in chosen} | self._copies
            self._spoilt |= {above for path in chosen for above in path.parents}
        self._readable = [s for s in _complete(self.folder) if s not in self._spoilt]
        names = [str(path.relative_to(self.folder)) for path in chosen]
        return {"kind": kind, "status": status, "files": names, "wrong": wrong}

    def _second(self, first: _Start) -> list[str]:
        """A start beside one that is paused, or it might end before the other looks."""
        if not first.pause():
            return []
        other, text = None, ""
        if (self.folder / "lock").exists():
            other = _Start(self.job, self.folder, self.log.with_suffix(".second"))
            text = f"second: {other.end()} {_jobs.output_of(other.log)[-300:]}"
        os.kill(first.pid, signal.SIGCONT)
        refused = other is None or (other.status in (1, 2) and "is in use by process" in text)
        return [] if refused else [text]

    def _look(self, status: int | None, kind: str) -> list[str]:
        text, wrong = _jobs.output_of(self.log), []
        match = _FROM.search(text)
        newest = int(self._readable[-1].name) if self._readable else 0
        # It may be further than what was left whole: a bit may lie where nothing reads.
        if _STEP.search(text) and int(match[1] if match else 0) < newest:
            wrong.append(f"went on from {match and match[1]}, not from {newest}")
        last = text.strip().splitlines()[-1:] or [""]
        if status == 0 and (result := self.result()) != self.peace:
            wrong.append(f"other bits than without faults: {result}")
        elif status not in (0, -signal.SIGKILL):
            if kind == "full":
                named = "No space left" in last[0] or "ENOSPC" in last[0]
            else:
                # What names its file may be mended, and the run goes on.
                named = any(path.name in last[0] for path in self._copies)
                for path, content in self._copies.items():
                    path.write_bytes(content)
            if not named:
                wrong.append(f"status {status}: {text[-600:]}")
        return wrong

    def result(self) -> str:
        paths = [path for name in self.job[1] for path in sorted(self.folder.glob(name))]
        contents = b"".join(path.read_bytes() for path in paths)
        return hashlib.sha256(contents).hexdigest() if paths else _jobs.digest(self.log)

    def finish(self) -> list[str]:
        wrong: list[str] = []
        for _ in range(2):
            status = _Start(self.job, self.folder, self.log).end()
            wrong += self._look(status, "")
            self._copies = {}
            if status == 0:
                return wrong
        return [*wrong, f"no end: {_jobs.output_of(self.log)[-600:]}"]


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Callable[[int], None] | None]:
    """A file system in memory and what sets the bytes left on it; none where one may not mount."""
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={_LARGE_DISK}", "tmpfs", str(folder)]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        yield None
        return

    def leave(size: int) -> None:
        usage = shutil.disk_usage(folder)
        total = max(_LARGE_DISK, usage.used) if size == _LARGE_DISK else usage.used + size
        subprocess.run(["mount", "-o", f"remount,size={total}", str(folder)], check=True)

    try:
        yield leave
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _faults(name: str, directory: Path, count: int, record: Path) -> list[dict[str, Any]]:
    lines = record.read_text().splitlines() if record.exists() else []
    rows = [row for row in map(json.loads, lines) if row["job"] == name]
    job, draw = _JOBS[name], random.Random(time.time_ns())
    with _small_disk(directory / name) as disk:
        peace = _Run(job, directory / name / "peace", lambda _: None, "")
        status = _Start(job, peace.folder, peace.log).end()
        if status != 0:
            raise RuntimeError(f"{name} without faults: {_jobs.output_of(peace.log)[-2000:]}")
        expected, kinds = peace.result(), [k for k in _KINDS if disk or k != "full"]
        while len(rows) < count:
            folder = directory / name / f"run-{len(rows)}"
            run = _Run(job, folder, disk or (lambda _: None), expected)
            made: list[dict[str, Any]] = []
            while len(rows) + len(made) < count and len(made) < 12:
                kind = kinds[(len(rows) + len(made)) % len(kinds)]
                made.append({"job": name} | run.fault(kind, draw))
                if made[-1]["status"] == 0:
                    break
            made[-1]["wrong"] += run.finish()
            with record.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in made)
            rows += made
            shutil.rmtree(folder)
            for row in made:
                print(*row.values(), flush=True)
    return rows


def run(options: suite.Options) -> suite.Result:
    """Faults of each job, until there were enough."""
    # Before a fork nothing may start a thread of XLA's: children make their own devices.
    jax.config.update("jax_compilation_cache_dir", str(options.directory.resolve() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    parts = ("loop",) if options.smoke else options.parts(list(_JOBS))
    record = options.directory.resolve() / "faults.jsonl"
    rows, bars = [], []
    for name in parts:
        count = 14 if options.smoke else _FULL[name]
        faults = _faults(name, _jobs.fresh(options), count, record)
        counts = collections.Counter(fault["kind"] for fault in faults)
        row: dict[str, Any] = {"run": name} | {kind: counts[kind] for kind in _KINDS}
        named = sum(fault["status"] not in (0, -signal.SIGKILL) for fault in faults)
        wrong = sum(bool(fault["wrong"]) for fault in faults)
        rows.append(row | {"refused by name": named, "lost, wrong or unclear": wrong})
        bars.append(suite.at_least(f"{name}: faults", len(faults), count))
        bars.append(suite.at_most(f"{name}: lost, wrong or unclear", wrong, 0))
    return suite.Result(rows=rows, bars=bars)
