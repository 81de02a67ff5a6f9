"""The library as it was at a commit beside the library as it is: processes that time the same."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[pathlib.Path]:
    """A folder with the package `logitjax` of a commit.

    Raises:
        ValueError: git knows no such commit here.
    """
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, "logitjax"]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise ValueError(f"against: expected a commit, got {commit!r}: {done.stderr.decode()}")
    with tempfile.TemporaryDirectory() as directory:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as packed:
            packed.extractall(directory, filter="data")
        yield pathlib.Path(directory)


@contextlib.contextmanager
def worker(script: pathlib.Path, package: pathlib.Path, arguments: Sequence[str]) -> Iterator:
    """A process of a script that imports what lies in `package`; asked a line it answers one."""
    # -P: the script's own folder would come before.
    process = subprocess.Popen(
        [sys.executable, "-P", str(script), *arguments],
        env=os.environ | {"PYTHONPATH": str(package)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    questions, answers = process.stdin, process.stdout
    assert questions is not None
    assert answers is not None

    def ask(line: str) -> str:
        questions.write(line + "\n")
        questions.flush()
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"the worker of {package} ended with {process.wait()}")
        return answer.strip()

    try:
        yield ask
    finally:
        questions.close()
        process.wait()
