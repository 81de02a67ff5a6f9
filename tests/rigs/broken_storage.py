"""A disk or store fails or hangs, in any process and phase: who ends when, with which message?

A run of two processes packs, reads a source, restores, trains and saves; a library loaded before
libc fails its calls on the files of one phase, in one process. On an emulated object store the
answers of a phase's requests are 503, or never come.
"""

import contextlib
import dataclasses
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.shared import suite
from tests.rigs import _jobs
from tests.rigs._object_store import Fault, Store

# Without any progress for so long a run ends, and may take so much longer to do so.
_LIMIT, _MORE = 40.0, 30.0
_PHASES = {
    "pack": "/packed/",
    "source": "/source/",
    "restore": "/checkpoints/",
    "first step": "/metrics.jsonl",
    "save": "/checkpoints/",
}
_DOCUMENTED = 75


@dataclasses.dataclass(frozen=True)
class _Case:
    phase: str
    kind: str
    process: str
    store: bool = False
    reading: bool = False


def _cases() -> list[_Case]:
    cases = []
    for phase in _PHASES:
        for process in ("0", "1"):
            if phase == "restore":
                cases += [_Case(phase, kind, process, reading=True) for kind in ("EIO", "hang")]
            elif process == "1" and phase in ("pack", "first step"):
                # It writes nothing there. What is packed, it reads.
                if phase == "pack":
                    cases += [_Case(phase, kind, "1", reading=True) for kind in ("EIO", "hang")]
            else:
                cases += [_Case(phase, k, process) for k in ("ENOSPC", "EIO", "EROFS", "hang")]
        cases += [_Case(phase, kind, "any", store=True) for kind in ("503", "hang")]
    return cases


def _library(directory: Path) -> Path | None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    target = directory / "failing_disk.so"
    source = Path(__file__).with_name("_failing_disk.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", target, source, "-ldl"]
    return None if subprocess.run(command).returncode else target


def _run(case: _Case, directory: Path, library: Path, store: Store) -> dict[str, Any]:
    words = (case.kind, "in", case.phase, "of", case.process, "store" if case.store else "disk")
    name = "-".join(words).replace(" ", "_")
    log, fired = directory / f"{name}.log", directory / f"{name}.fired"
    workdir = f"gs://bucket/{directory.name}/{name}" if case.store else str(directory / name)
    job = _jobs.module("tests.rigs._phases_job", f"--workdir={workdir}")
    command = _jobs.local(2, 1, job)
    common = {"GRACE": "10"} | (store.variables() if case.store else {})
    if case.phase == "restore":
        _jobs.finish(command, log, PHASES_STEPS="4", **common)
        log.unlink()
    part = _PHASES[case.phase]
    variables = {"LOGITJAX_STALL_SECONDS": f"{_LIMIT:g}", "LOGITJAX_HEARTBEAT_SECONDS": "20"}
    before = sum(store.faulted.values())
    if case.store:
        store.faults = [Fault(case.kind, f"{directory.name}/{re.escape(name)}.*{part}")]
    else:
        variables |= {
            "LD_PRELOAD": str(library),
            "FAULT_PATH": part,
            "FAULT_KIND": case.kind,
            "FAULT_PROCESS": case.process,
            "FAULT_FIRED": str(fired),
        }
        variables |= {"FAULT_READ": "1"} if case.reading else {}
    process = _jobs.start(command, log, PHASES_STEPS="8", **variables, **common)
    since: float | None = None
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if since is None and (fired.exists() or sum(store.faulted.values()) > before):
            since = time.monotonic()
        time.sleep(0.05)
    seconds = time.monotonic() - since if since is not None else 0.0
    status = process.poll()
    process.terminate()
    process.wait()
    store.faults = []
    last = (_jobs.output_of(log).splitlines() or [""])[-1]
    good = (
        since is not None
        and status == _DOCUMENTED
        and seconds <= _LIMIT + _MORE
        and last.startswith("local: process ")
        and "error: " in last
    )
    return {
        "phase": case.phase,
        "fault": f"store: {case.kind}" if case.store else case.kind,
        "process": case.process,
        "happened": since is not None,
        "status": status,
        "seconds": round(seconds, 1),
        "last line": last.partition("error: ")[2][:110] or last[:110],
        "as documented": good,
    }


def _until_it_happens(case: _Case, directory: Path, *given: Any) -> dict[str, Any]:
    """On a machine that is busy a run may come to the limit before it comes to the fault."""
    row: dict[str, Any] = {}
    for attempt in range(3):
        attempt_folder = directory / f"attempt-{attempt}"
        attempt_folder.mkdir(exist_ok=True)
        row = _run(case, attempt_folder, *given)
        if row["happened"]:
            break
    return row


def run(options: suite.Options) -> suite.Result:
    """Two faults at the smoke scale, all of them at the full one."""
    directory = _jobs.fresh(options)
    library = _library(directory)
    if library is None:
        return suite.Result(rows=[{"skipped": "a C compiler on Linux is needed"}])
    # `--only=save,source/EIO/1` for some phases, or single faults in them.
    prefixes = options.only.split(",")
    cases = [c for c in _cases() if f"{c.phase}/{c.kind}/{c.process}".startswith(tuple(prefixes))]
    if options.smoke:
        cases = [_Case("save", "ENOSPC", "1"), _Case("source", "EIO", "0")]
    with contextlib.closing(Store()) as store:
        rows = [_until_it_happens(case, directory, library, store) for case in cases]
    name = f"faults that end both processes with {_DOCUMENTED} and a cause within "
    bar = suite.at_least(
        f"{name}{_LIMIT + _MORE:g} s", suite.total(rows, "as documented"), len(rows)
    )
    return suite.Result(rows=rows, bars=[bar])
