"""A server in a process of its own, on a free port of the loopback interface."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request


@contextlib.contextmanager
def server(*arguments, timeout=180):
    """Yields its address once it answers; ends it with SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "logitjax", "serve", f"--port={port}", *arguments]
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + timeout
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {process.stderr.read()[-2000:]}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            if time.monotonic() > deadline:
                raise TimeoutError("the server did not come up")
            time.sleep(0.2)
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
