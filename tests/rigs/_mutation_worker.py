"""A process that has imported what is slow to import, and forks to run tests.

Started as a script in a copy of the tree, whose package it must not import itself: each fork
imports it anew, with the mutant in it, and only then starts JAX's devices. Jobs come as lines of
JSON, and so do their outcomes. `Worker` is the other end.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Without an end in sight a mutant may fill the memory; threads' stacks count here too.
_MOST_BYTES = 24 << 30


class Worker:
    """Runs pytest in forks of one warm process.

    Args:
      tree: the copy of the tree, where the process runs.
      preload: modules imported once, none of them the tree's own except what sets up its tests.
      environment: what is set there beyond this process's own variables.
    """

    def __init__(self, tree: Path, preload: Sequence[str], environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *preload],
            cwd=tree,
            env={**os.environ, **environment, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        arguments: Sequence[str],
        *,
        package: str,
        wall: float,
        cpu: float,
        bytecode: bool,
        log: Path,
    ) -> dict[str, Any]:
        """Runs pytest once.

        Args:
          arguments: of pytest.
          package: whose file is reported, for one installed elsewhere must not be tested.
          wall: seconds after which it is ended.
          cpu: seconds of the processor after which it is.
          bytecode: whether Python may keep what it compiles, which a mutant must not.
          log: where its output goes.

        Returns:
          ``code`` as pytest's or the negative of a signal, ``seconds``, ``cpu``, ``failed``: the
          first test that did, and ``file``: the package's.
        """
        job = {
            "arguments": list(arguments),
            "package": package,
            "wall": wall,
            "cpu": cpu,
            "bytecode": bytecode,
            "log": str(log),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class _Outcome:
    """A pytest plugin: which test failed first."""

    def __init__(self):
        self.failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)


def _child(job: dict[str, Any], answer: int) -> int:
    os.setpgid(0, 0)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    limit = int(job["cpu"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
    sys.dont_write_bytecode = not job["bytecode"]
    import pytest

    outcome = _Outcome()
    code = int(pytest.main(job["arguments"], plugins=[outcome]))
    file = getattr(sys.modules.get(job["package"]), "__file__", None)
    os.write(answer, json.dumps({"failed": outcome.failed, "file": file}).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads and devices of JAX need no farewell.
    os._exit(code)


def _wait(child: int, seconds: float) -> tuple[int, resource.struct_rusage | None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    _, _, usage = os.wait4(child, 0)
    return -int(signal.SIGXCPU), usage


def _serve(preload: Sequence[str]) -> None:
    sys.path[0] = os.getcwd()
    for name in preload:
        importlib.import_module(name)
    # What pytest prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        begin = time.monotonic()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _child(job, writing)
        os.close(writing)
        code, usage = _wait(child, job["wall"])
        # What the tests started and left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        # Never more than fits into a pipe; nothing from a process that was ended.
        os.set_blocking(reading, False)
        try:
            said = os.read(reading, 1 << 16)
        except BlockingIOError:
            said = b""
        os.close(reading)
        result = {"failed": "", "file": None, **json.loads(said or b"{}")}
        result |= {
            "code": code,
            "seconds": time.monotonic() - begin,
            "cpu": usage.ru_utime + usage.ru_stime if usage else 0.0,
        }
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.argv[1:])
