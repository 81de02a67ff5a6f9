"""Reads files in a process that may be killed: one line of JSON for each, on the output.

python -m tests.rigs._files_worker DIRECTORY < kinds_and_numbers
"""

import contextlib
import json
import os
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from experiments.shared.suite import memory_bytes
from tests.rigs._files_kinds import KINDS, seeded

# A backstop: what asks for more at once fails at once.
_ADDRESS_SPACE = 6 << 30
_ACTIONS = (
    *("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
    *("os.remove", "os.rename", "os.mkdir", "os.chmod", "os.symlink", "os.link", "os.putenv"),
    *("shutil.", "socket.", "ctypes.dlopen", "pickle.find_class", "urllib.Request"),
    *("webbrowser.", "pty.spawn"),
)


class Watch:
    """Notes what Python says that code does while a file is read."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        # The one that a library may start, and in which templates are locked up.
        if event == "subprocess.Popen" and str(arguments[1]).count("_template_worker.py"):
            return
        if event.startswith(_ACTIONS):
            self.seen.append(event)
        # A number is a pipe to that process, and not a file.
        elif event == "open" and not isinstance(arguments[0], int) and _writes(arguments[1]):
            self.seen.append(f"open {arguments[0]} {arguments[1]}")


def _writes(mode: Any) -> bool:
    return isinstance(mode, str) and bool(set(mode) & set("wax+"))


def _forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def read(kind: str, number: int, home: Path, watch: Watch) -> dict[str, Any]:
    """The outcome of one file: its fate, CPU-seconds, and bytes over 1.3 times its tensors."""
    directory = home / "file"
    directory.mkdir()
    KINDS[kind].write(directory, number, seeded(kind, number))
    os.chdir(home)
    fate, text, tensors = "loaded", "", 0
    before = memory_bytes("VmRSS")
    _forget()
    # Of the processor: on a machine that is shared, the clock says what others do.
    watch.on, start = True, time.process_time()
    try:
        tensors = KINDS[kind].load(directory)
    except (ValueError, FileNotFoundError) as error:
        fate, text = "error", str(error)
        # A template has no file: it may come out of four.
        rendering = text.startswith(("messages: the chat template", "chat template", "tokenizer: "))
        named = rendering or str(directory) in text
        if "\n" in text or not named or "MemoryError" in text or "Unable to allocate" in text:
            fate = "wrong"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # PanicException of Rust is one
        fate, text = "wrong", f"{type(error).__name__}: {error}"
    seconds, watch.on = time.process_time() - start, False
    over = memory_bytes("VmHWM") - before - int(1.3 * tensors)
    ran = [*watch.seen, *(["ran"] if (home / "ran").exists() else [])]
    watch.seen.clear()
    shutil.rmtree(directory)
    row = {"kind": kind, "number": number, "fate": fate, "text": text[:300]}
    return row | {"seconds": seconds, "over": over, "ran": ran}


def main(home: str) -> None:
    """Reads files, `[kind, number]` a line of the input, written into a directory."""
    warnings.simplefilter("ignore")
    watch = Watch()
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    warmed = set()
    for line in sys.stdin:
        kind, number = json.loads(line)
        if kind not in warmed:
            # What is loaded the first time for all files does not count for one.
            read(kind, KINDS[kind].warm, Path(home), watch)
            warmed.add(kind)
        print(json.dumps(read(kind, number, Path(home), watch)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
