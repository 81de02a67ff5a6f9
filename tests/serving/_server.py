"""A server in a process of its own, on a free port of the loopback interface."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import urllib.error
import urllib.request


@contextlib.contextmanager
def server(*arguments, timeout=180, files=None):
    """Yields its address once it is ready; ends it with SIGTERM. ``files``: most it may open."""
    command = [sys.executable, "-m", "logitjax", "serve", "--port=0", *arguments]

    process = subprocess.Popen(
        command,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if files is not None:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files, files))
    try:
        line = process.stdout.readline()
        if not line.startswith("listening on http://"):
            process.wait(timeout=10)
            raise RuntimeError(f"the server said {line!r}: {process.stderr.read()[-2000:]}")
        address = line.split()[-1]
        deadline = time.monotonic() + timeout
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {process.stderr.read()[-2000:]}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/ready", timeout=2)
                break
            if time.monotonic() > deadline:
                raise TimeoutError("the server did not come up")
            time.sleep(0.1)
        yield address, process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def post(address, path, body, *, key=None, raw=None):
    """``(status, decoded body, headers)`` of a POST, errors included."""
    data = json.dumps(body).encode() if raw is None else raw
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers
