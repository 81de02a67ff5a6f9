"""Programs that rigs start, kill and start again, at the root of the repository."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.shared.suite import ROOT, Options


def module(name: str, *words: str) -> list[str]:
    """The command that runs a module."""
    return [sys.executable, "-m", name, *words]


def local(processes: int, devices: int, command: Sequence[str]) -> list[str]:
    """The command that runs another one in several processes of this machine."""
    return ["bash", "launch/local.sh", str(processes), str(devices), *command]


def start(command: Sequence[str], log: Path, **variables: str) -> subprocess.Popen:
    """A process whose output and errors go to the end of a file."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **variables}
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def finish(command: Sequence[str], log: Path, **variables: str) -> None:
    """Runs a command; a RuntimeError has the end of what it said where it does not end well."""
    if status := start(command, log, **variables).wait():
        raise RuntimeError(f"{' '.join(command)} ended with {status}:\n{output_of(log)[-4000:]}")


def output_of(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def digest(log: Path) -> str:
    """The last digest of a final state in a log, as `_faults_job` prints it."""
    lines = reversed(output_of(log).splitlines())
    return next((line for line in lines if line.startswith("digest ")), "none")


def fresh(options: Options) -> Path:
    """A folder of this run alone."""
    directory = options.directory.resolve() / f"run-{time.time_ns()}"
    directory.mkdir(parents=True)
    return directory
