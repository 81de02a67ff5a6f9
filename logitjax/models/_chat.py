"""Chat templates, rendered as transformers renders them."""

import atexit
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from logitjax.storage import guard, require

Spans = list[tuple[int, int]]

_SCRIPT = pathlib.Path(__file__).with_name("_template_worker.py")


def render_template(
    template: str, variables: Mapping[str, Any], seconds: float, day: str | None = None
) -> tuple[str, Spans | None]:
    """The text that a template renders, and its `{% generation %}` spans; None without any.

    `day` is what a template takes for the present one, `YYYY-MM-DD`; None for that of the clock.
    """
    limits = guard.LIMITS
    guard.whole(len(template), "chat template: length", most=limits.template_bytes)
    fields = {"source": template, "variables": variables, "seconds": seconds, "day": day}
    request = json.dumps(fields)
    most = limits.text + 64 * len(request)
    answer = _WORKER.ask(f'{request[:-1]}, "most": {most}}}', seconds)
    if "error" in answer:
        raise ValueError(f"messages: the chat template refuses them ({answer['error']})")
    spans = [(start, end) for start, end in answer["spans"]]
    return answer["text"], spans if answer["marks"] else None


class _Worker:
    """The rendering process, started by the first template, and again after one that killed it."""

    def __init__(self) -> None:
        self.forget()
        atexit.register(self.end)
        # A forked child must not read the answers for its parent.
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self._lock = threading.Lock()
        self._process: Any = None

    def ask(self, line: str, seconds: float) -> dict[str, Any]:
        with self._lock:
            if self._process is None:
                require("jinja2", extra="models")
                command = [sys.executable, "-P", str(_SCRIPT)]
                pipe = subprocess.PIPE
                self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe)
            process, content = self._process, b""
            try:
                # The missing answer shows that it has ended.
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(line.encode() + b"\n")
                    process.stdin.flush()
                content = process.stdout.readline()
            finally:
                # Also after an interrupt: otherwise the next template would get this one's answer.
                if not content.endswith(b"\n"):
                    self.end()
        if content.endswith(b"\n"):
            return json.loads(content)
        late = process.returncode == -signal.SIGPROF
        reason = f"longer than {seconds:g} s" if late else "too much memory"
        return {"error": f"it takes {reason}"}

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


_WORKER = _Worker()


def plain(value: Any, name: str) -> Any:
    """A copy made of JSON's types, so that a template reaches no other methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{name}[{i}]") for i, v in enumerate(value)]
    raise TypeError(f"{name}: expected a JSON value, got {type(value).__name__}")


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: no fields of None, reasoning under both its names."""
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            kind = type(message).__name__
            raise TypeError(f"messages[{i}]: expected a mapping with role and content, got {kind}")
        fields = {k: v for k, v in plain(message, f"messages[{i}]").items() if v is not None}
        # Publishers of reasoning models have not agreed on a name.
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((fields[n] for n in names if n in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        out.append(fields)
    return out
