"""The completion server under attack: its policy, and hostile clients, over loopback.

Parts, for `--only`: `red_team_*` (attackers made from the request's schema before each policy, on a
row of each model, in one process), `prefix` (what 32 prompts with a common beginning cost),
`health` (while 50 prompts of a megabyte come in), `gaps` (of other streams beside a prompt of 900
tokens), `bombs` (of short answers beside slow schemas), `half_open` (a thousand connections that
say nothing, at 256 files), `signal` (SIGTERM among streams), `fuzz` (nonsense) and `load` (200
clients for a minute). A small random decoder answers over loopback where not said otherwise;
`health`, `gaps` and `bombs` ask SmolLM2-135M. tests/serving/test_serve.py has requests of the
server's own description, and a whole row.
"""

import collections
import concurrent.futures
import http.client
import pathlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from experiments.shared import suite
from experiments.shared.peers import serving
from tests.rigs import _server_hostile as hostile
from tests.rigs._server_client import connect, post, small_model
from tests.rigs._server_hostile import Found
from tests.rigs._server_prefixes import prefixes
from tests.rigs._server_red_team import MODELS, red_team

CLIENTS, SECONDS, FUZZED = 200, 60, 50_000


def run(options: suite.Options) -> suite.Result:
    smoke = options.smoke
    rows: list[dict[str, Any]] = []
    bars: list[suite.Bar] = []
    with tempfile.TemporaryDirectory() as scratch:
        small = pathlib.Path(scratch) / "small"
        small_model(small, 1000)
        real = str(small) if smoke else "smollm2"
        parts: dict[str, Callable[[], Found]] = {
            **{
                f"red_team_{pathlib.Path(spec).stem}": lambda spec=spec: red_team(options, spec)
                for spec in MODELS
            },
            "prefix": lambda: prefixes(options),
            "health": lambda: hostile.long_prompts(options, real),
            "gaps": lambda: hostile.gaps(options, real),
            "bombs": lambda: hostile.bombs(options, real),
            "half_open": lambda: hostile.half_open(options, small),
            "signal": lambda: hostile.ended_by_signal(options, small),
            "fuzz": lambda: hostile.fuzz(options, small, 400 if smoke else FUZZED),
            "load": lambda: _loaded(small, 8 if smoke else CLIENTS, 3 if smoke else SECONDS),
        }
        for name in options.parts(list(parts)):
            lines, decided = parts[name]()
            for row in lines:
                logging.info("%s: %s", name, row)
            rows += [{"part": name} | row for row in lines]
            bars += decided
    return suite.Result(rows=rows, bars=bars)


def _loaded(directory: pathlib.Path, clients: int, seconds: float) -> Found:
    flags = (f"--model={directory}", "--max_length=64", "--max_tokens=16")
    with serving(*flags, "--slots=16", "--max_waiting=64") as (address, process):
        row = _load(address, process, clients, seconds)
    return [row], [
        suite.at_most("load: 5xx or broken answers", row["5xx or broken"], 0),
        suite.at_most("429 without Retry-After", row["429 without Retry-After"], 0),
        suite.at_most("resident memory grew by", row["RSS grew by"], 0.05),
    ]


def _load(address: str, process: subprocess.Popen, clients: int, seconds: float) -> dict[str, Any]:
    """Every client asks again as soon as it has its answer, or as it is told to wait."""
    codes: collections.Counter = collections.Counter()
    without_hint = 0
    memory: list[tuple[float, int]] = []
    begun = time.monotonic()
    lock = threading.Lock()

    def client(number: int) -> None:
        nonlocal without_hint
        rng = np.random.default_rng(number)
        connection = connect(address)
        while time.monotonic() - begun < seconds:
            prompt = rng.integers(1, 200, rng.integers(2, 24)).tolist()
            body = {"prompt": prompt, "max_tokens": int(rng.integers(1, 17)), "logprobs": 2}
            try:
                status, headers, _ = post(connection, body)
            except (OSError, http.client.HTTPException):
                status, headers = 599, {}
                connection.close()
            with lock:
                codes[status] += 1
                if status == 429 and "Retry-After" not in headers:
                    without_hint += 1
            if status == 429:
                # A polite client; capped so that the queue stays full.
                time.sleep(min(float(headers.get("Retry-After", 1)), 2.0) * rng.uniform(0.5, 1.0))

    def watch() -> None:
        while time.monotonic() - begun < seconds:
            memory.append((time.monotonic() - begun, suite.memory_bytes("VmRSS", process.pid)))
            time.sleep(0.5)

    with concurrent.futures.ThreadPoolExecutor(clients + 1) as pool:
        watcher = pool.submit(watch)
        list(pool.map(client, range(clients)))
        watcher.result()
    spent = time.monotonic() - begun
    warm = [size for at, size in memory if at > seconds / 3]
    return {
        "what": f"{clients} clients, {seconds:g} s",
        "answers": codes[200],
        "answers a second": codes[200] / spent,
        "429": codes[429],
        "429 without Retry-After": without_hint,
        "5xx or broken": sum(n for code, n in codes.items() if code >= 500),
        "RSS after warm-up, MB": warm[0] / 1e6,
        "RSS grew by": max(warm) / warm[0] - 1.0,
    }
