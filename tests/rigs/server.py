"""The completion server under attack: its policy, and hostile clients, over loopback.

Parts, for `--only`: `policy` (adversarial requests in one process with a tiny model: how many
values of a position come out, and whether the width does), `attackers` (those of
`logitjax.leakage`, over HTTP, before each policy), `prefix` (what 32 prompts with a common
beginning cost), `health` (while 50 prompts of a megabyte come in), `gaps` (of other streams beside
a prompt of 900 tokens), `half_open` (a thousand connections that say nothing, at 256 files),
`signal` (SIGTERM among streams), `fuzz` (nonsense), `load` (200 clients for a minute), `described`
(requests that schemathesis makes from the server's own description) and `row` (49,152
log-probabilities through the top 5 and a reported bias). A small random decoder answers over
loopback where not said otherwise; `health` and `gaps` ask SmolLM2-135M.
"""

import collections
import concurrent.futures
import http.client
import os
import pathlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.shared import suite
from logitjax import leakage
from tests.rigs import _server_hostile as hostile
from tests.rigs import _server_policy as inside
from tests.rigs._server_attackers import attackers
from tests.rigs._server_client import connect, post, running, small_model
from tests.rigs._server_hostile import Found

CLIENTS, SECONDS, DESCRIBED, FUZZED = 200, 60, 1000, 50_000


def run(options: suite.Options) -> suite.Result:
    smoke = options.smoke
    described = int(os.environ.get("LOGITJAX_FUZZ", 40 if smoke else DESCRIBED))
    rows: list[dict[str, Any]] = []
    bars: list[suite.Bar] = []
    with tempfile.TemporaryDirectory() as scratch:
        small, wide = pathlib.Path(scratch) / "small", pathlib.Path(scratch) / "wide"
        small_model(small, 1000)
        real = str(small) if smoke else "smollm2"
        parts: dict[str, Callable[[], Found]] = {
            "policy": lambda: inside.policies(options),
            "attackers": lambda: attackers(options, small),
            "prefix": lambda: inside.prefixes(options),
            "health": lambda: hostile.long_prompts(options, real),
            "gaps": lambda: hostile.gaps(options, real),
            "half_open": lambda: hostile.half_open(options, small),
            "signal": lambda: hostile.ended_by_signal(options, small),
            "fuzz": lambda: hostile.fuzz(options, small, 400 if smoke else FUZZED),
            "load": lambda: _loaded(small, 8 if smoke else CLIENTS, 3 if smoke else SECONDS),
            "described": lambda: _described_fuzz(small, described),
            "row": lambda: _row(wide, 1000 if smoke else 49_152),
        }
        chosen = options.only.split(",") if options.only else list(parts)
        unknown = set(chosen) - set(parts)
        if unknown:
            raise ValueError(f"only: expected some of {', '.join(parts)}, got {unknown}")
        for name in chosen:
            found, decided = parts[name]()
            for row in found:
                logging.info("%s: %s", name, row)
            rows += [{"part": name} | row for row in found]
            bars += decided
    return suite.Result(rows=rows, bars=bars)


def _loaded(directory: pathlib.Path, clients: int, seconds: float) -> Found:
    flags = (f"--model={directory}", "--max_length=64", "--max_tokens=16")
    with running(*flags, "--slots=16", "--max_waiting=64") as (address, process):
        row = _load(address, process, clients, seconds)
    return [row], [
        suite.at_most("load: 5xx or broken answers", row["5xx or broken"], 0),
        suite.at_most("429 without Retry-After", row["429 without Retry-After"], 0),
        suite.at_most("resident memory grew by", row["RSS grew by"], 0.05),
    ]


def _described_fuzz(directory: pathlib.Path, count: int) -> Found:
    flags = (f"--model={directory}", "--max_length=64", "--max_tokens=16", "--bias=sampling")
    with running(*flags, "--slots=16", "--max_waiting=64") as (address, process):
        row = _described(address, process, count)
    name = "described requests: 5xx or broken answers"
    return [row], [suite.at_most(name, row["5xx or broken"], 0)]


def resident_bytes(process: subprocess.Popen) -> int:
    for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


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
            memory.append((time.monotonic() - begun, resident_bytes(process)))
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


def _described(address: str, process: subprocess.Popen, count: int) -> dict[str, Any]:
    import hypothesis
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    codes: collections.Counter = collections.Counter()
    for path in ("/v1/completions", "/v1/chat/completions"):

        @hypothesis.given(case=schema[path]["POST"].as_strategy())
        @hypothesis.settings(
            max_examples=count // 2,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),  # pyright: ignore[reportArgumentType]
        )
        def fuzz(case: Any) -> None:
            codes[case.call(timeout=60).status_code] += 1

        fuzz()
    # Bytes that are no request at all.
    rng = np.random.default_rng(0)
    connection = connect(address)
    for _ in range(max(1, count // 10)):
        raw = rng.bytes(int(rng.integers(0, 400)))
        connection.request("POST", "/v1/completions", raw, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        codes[answer.status] += 1
    return {
        "what": "requests of the description",
        "requests": sum(codes.values()),
        "200": codes[200],
        "4xx": sum(n for code, n in codes.items() if 400 <= code < 500),
        "5xx or broken": sum(n for code, n in codes.items() if code >= 500),
        "alive": process.poll() is None,
    }


def _row(directory: pathlib.Path, vocab: int) -> Found:
    model = small_model(directory, vocab)
    prompt = [72, 101, 108, 108, 111]
    hidden, _ = model.hidden_states(jnp.array([prompt]))
    truth = np.asarray(jax.nn.log_softmax(model.logits(hidden)[0, -1]), np.float64)
    arguments = (f"--model={directory}", "--bias=reported", "--decimals=7", "--slots=16")
    with running(*arguments, "--max_length=64", "--max_waiting=64") as (address, _):
        policy = leakage.LogitPolicy(top_k=5, bias="reported", decimals=7)
        oracle = leakage.HttpOracle(address, policy, workers=32)
        start = time.perf_counter()
        row = leakage.recover_log_probs(oracle, prompt, vocab)
        seconds = time.perf_counter() - start
        oracle.close()
    error = float(np.abs(row.log_probs - truth)[row.known].max())
    record = {
        "what": "a row over HTTP, top 5 and bias",
        "V": vocab,
        "queries": oracle.queries,
        "queries a second": oracle.queries / seconds,
        "coverage": row.coverage,
        "error, nats": error,
    }
    bars = [
        suite.at_most("row over HTTP: largest error, nats", error, 5e-6),
        suite.at_most(
            "row over HTTP: queries / (1 + ceil((V - 1) / 4))",
            oracle.queries / leakage.row_queries(vocab, 5),
            1.0,
        ),
    ]
    return [record], bars
