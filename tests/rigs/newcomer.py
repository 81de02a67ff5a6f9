"""A stranger's first hour: does a wheel outside of the repository say what it does, and go on?

The wheel is installed into an empty environment, which at the smoke scale borrows the requirements
of this one, and fetches them itself at full scale. In an empty folder somebody mistypes, corrects
it, presses Ctrl-C and repeats the command, once in a pipe and once on a terminal.
"""

import contextlib
import fcntl
import itertools
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import sysconfig
import termios
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.shared import suite
from experiments.shared.suite import ROOT
from tests.rigs import _jobs

_FIRST_LINE, _SILENCE = 5.0, 10.0
_DISTILL = [
    "distill", "--student=tiny", "--drop_layers=1", "--seq_len=64", "--batch_size=2",
    "--eval_rows=4", "--steps=400", "--log_every=5", "--checkpoint_every=10", "--out=runs/small",
]  # fmt: skip


def _wheel(directory: Path) -> Path:
    """The wheel of the working tree, built once for all Pythons where one is given."""
    given = os.environ.get("LOGITJAX_WHEEL")
    if given:
        return Path(given)
    log = directory / "wheel.log"
    _jobs.finish(_jobs.module("pip", "wheel", "--no-deps", "--quiet", "--wheel-dir",
                              str(directory), str(ROOT)), log)  # fmt: skip
    return next(directory.glob("logitjax-*.whl"))


def _install(directory: Path, wheel: Path, *, borrow: bool) -> Path:
    environment = directory / "environment"
    venv.create(environment, with_pip=not borrow)
    python = environment / "bin" / "python"
    if borrow:
        # A `.pth` adds a folder and none of its hooks: the editable installation stays unseen.
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        below = environment / "lib" / version / "site-packages"
        (below / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = _jobs.module("pip", "--python", str(python), "install", "--quiet", "--no-deps")
    else:
        pip = [str(python), "-m", "pip", "install", "--quiet"]
    name = str(wheel) if borrow else f"{wheel}[models,plots]"
    _jobs.finish([*pip, "--force-reinstall" if borrow else "--upgrade", name],
                 directory / "install.log")  # fmt: skip
    return environment / "bin" / "logitjax"


def _run(
    command: Sequence[str], folder: Path, *, terminal: bool = False, interrupt_at: str = ""
) -> dict[str, Any]:
    """Runs a command and notes what was said when; Ctrl-C comes after a text."""
    # None of the repository, and no settings of tests.
    keep = ("PATH", "HOME", "LANG", "JAX_COMPILATION_CACHE_DIR")
    environment = {n: v for n, v in os.environ.items() if n in keep} | {"COLUMNS": "100"}
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        # Without a size there is no room for a bar.
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=writer,
        stderr=writer,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # A shell's background job, as this may be, ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(writer)
    text, times, sent = "", [begin], False
    while True:
        # A terminal whose program has ended is an error to read.
        with contextlib.suppress(OSError):
            if select.select([reader], [], [], 600.0)[0] and (part := os.read(reader, 1 << 16)):
                text += part.decode(errors="replace")
                times.append(time.monotonic())
                if interrupt_at and not sent and re.search(interrupt_at, text):
                    process.send_signal(signal.SIGINT)
                    sent = True
                continue
        break
    os.close(reader)
    status = process.wait()
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    return {
        "status": status,
        "first line, s": times[1] - begin if len(times) > 1 else float("inf"),
        "longest silence, s": max(gaps, default=0.0),
        "text": text,
    }


def _expect(step: Mapping[str, Any], status: int, *texts: str) -> bool:
    right = step["status"] == status and all(re.search(text, step["text"]) for text in texts)
    right = right and "Traceback" not in step["text"]
    if not right:
        print(f"expected status {status} and {texts}, got {step['status']}:\n{step['text']}")
    return right


def run(options: suite.Options) -> suite.Result:
    directory = _jobs.fresh(options)
    command = [str(_install(directory, _wheel(directory), borrow=options.smoke))]
    folder = directory / "empty"
    folder.mkdir()
    words = "It is a plain sentence of some words. " * 40
    (folder / "book.txt").write_text("\n\n".join(f"Chapter {i}. {words}" for i in range(40)))
    typo, right = [*command, *_DISTILL, "--data=text:bok.txt"], [*command, *_DISTILL]
    right.append("--data=text:book.txt")
    steps = {
        "help": (_run([*command, "--help"], folder), 0, ["usage: logitjax", "distill"]),
        "doctor": (_run([*command, "doctor"], folder), 0, ["jax ", "devices: ", "disk: "]),
        "typo": (_run(typo, folder), 2, [r"error: .*bok\.txt"]),
        "dry run": (_run([*right, "--dry_run"], folder), 0, ["reads ", "memory ", "minutes"]),
        "Ctrl-C": (_run(right, folder, interrupt_at="saving checkpoint 10"), 130,
                   ["into runs/small", "training from step 0", "the same command continues"]),
        "same again": (_run(right, folder, terminal=True), 0,
                       [r"resuming at step \d", "400/400", "student after"]),
        "generate": (_run([*command, "generate", "--model=runs/small/model", "--complete",
                           "--prompt=It", "--max_new_tokens=4"], folder), 0, ["It"]),
    }  # fmt: skip
    rows, failed = [], 0
    for name, (step, status, texts) in steps.items():
        as_expected = _expect(step, status, *texts)
        failed += not as_expected
        shown = {key: value for key, value in step.items() if key != "text"}
        rows.append({"step": name, "as expected": as_expected, **shown})
    return suite.Result(
        rows=rows,
        bars=[
            suite.at_most("steps that went otherwise", failed, 0),
            suite.at_most("first line, s", max(row["first line, s"] for row in rows), _FIRST_LINE),
            suite.at_most(
                "longest silence, s", max(row["longest silence, s"] for row in rows), _SILENCE
            ),
        ],
    )
