"""Programs beside this one: references to ask, and servers of the library."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast


@contextlib.contextmanager
def asking(*command: Any, **variables: str) -> Iterator[Callable[..., Any] | None]:
    """A program that prints ``ready``, and one line of JSON for each line that it reads.

    Yields:
        A function that queries it; None if it does not start.
    """
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, command)), env=os.environ | variables, **pipes)
    with process, cast(IO[str], process.stdin) as send, cast(IO[str], process.stdout) as receive:

        def ask(*question: Any) -> Any:
            send.write(json.dumps(question) + "\n")
            send.flush()
            return json.loads(receive.readline())

        ready = receive.readline().strip() == "ready"
        if not ready:
            print(f"{command[0]} did not start")
        yield ask if ready else None


def torch_peer(script: Path, *arguments: Any, smoke: bool) -> Any:
    """A script in the interpreter with torch that ``LOGITJAX_TORCH_PYTHON`` names.

    Returns:
        As `asking`; None in its place at the smoke scale, and without such an interpreter.
    """
    python = os.environ.get("LOGITJAX_TORCH_PYTHON")
    if not python or smoke:
        return contextlib.nullcontext()
    # Of the cores that this process may use, as XLA counts them.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return asking(python, script, *arguments, cores)


@contextlib.contextmanager
def serving(
    *arguments: str, files: int | None = None, python: str = sys.executable
) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server on a free loopback port, from when it is ready until the end of the context.

    Another interpreter runs the version installed for it, not the files of this tree.
    """
    command = [python, "-m", "logitjax", "serve", "--port=0", *arguments]
    environment = dict(os.environ)
    if python != sys.executable:
        command.insert(1, "-P")
        environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    if files is not None:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files, files))
    try:
        assert process.stdout is not None
        address = (process.stdout.readline().split() or [""])[-1]
        for _ in range(3000):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            with contextlib.suppress(OSError, ValueError):
                urllib.request.urlopen(f"{address}/ready", timeout=2)
                break
            time.sleep(0.2)
        yield address, process
    finally:
        process.terminate()
        process.wait(timeout=60)
