"""The completion server under load, under nonsense, and under an audit, all over loopback.

A small random decoder answers, so that HTTP, scheduling and memory are what is measured: 200
clients for a minute, fuzzed requests made from the server's own OpenAPI description, and one row of
49,152 log-probabilities through the top 5 and a logit bias.
"""

import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from experiments.benchmarks import _suite
from logitjax import leakage, models
from logitjax.models import Decoder, DecoderConfig, save_pretrained

CLIENTS, SECONDS, FUZZED = 200, 60, 1000


def small_model(directory: pathlib.Path, vocab: int) -> Decoder:
    """One layer and a wide vocabulary, on disk as any model is."""
    config = DecoderConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_length=512,
    )
    model = Decoder(config, rngs=nnx.Rngs(0), layout="listed")
    save_pretrained(model, models.load_tokenizer("tiny"), directory)
    return model


@contextlib.contextmanager
def running(
    *arguments: str, python: str = sys.executable
) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server of our own on a free loopback port; ended at the end.

    Another interpreter runs what is installed for it, not the files that lie here.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "logitjax", "serve", f"--port={port}", *arguments]
    environment = dict(os.environ)
    if python != sys.executable:
        command.insert(1, "-P")
        environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            time.sleep(0.2)
        yield address, process
    finally:
        process.terminate()
        process.wait(timeout=60)


def resident_bytes(process: subprocess.Popen) -> int:
    for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


def _post(connection: http.client.HTTPConnection, body: Any) -> tuple[int, Any]:
    text = json.dumps(body)
    connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status, answer.headers


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
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
        while time.monotonic() - begun < seconds:
            prompt = rng.integers(1, 200, rng.integers(2, 24)).tolist()
            body = {"prompt": prompt, "max_tokens": int(rng.integers(1, 17)), "logprobs": 2}
            try:
                status, headers = _post(connection, body)
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


def _fuzz(address: str, process: subprocess.Popen, count: int) -> dict[str, Any]:
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
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    for _ in range(max(1, count // 10)):
        raw = rng.bytes(int(rng.integers(0, 400)))
        connection.request("POST", "/v1/completions", raw, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        codes[answer.status] += 1
    return {
        "what": "fuzzed requests",
        "requests": sum(codes.values()),
        "200": codes[200],
        "4xx": sum(n for code, n in codes.items() if 400 <= code < 500),
        "5xx or broken": sum(n for code, n in codes.items() if code >= 500),
        "alive": process.poll() is None,
    }


def _audit(directory: pathlib.Path, vocab: int) -> tuple[dict[str, Any], list[_suite.Bar]]:
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
        _suite.Bar(name="row over HTTP: largest error, nats", value=error, limit=5e-6),
        _suite.Bar(
            name="row over HTTP: queries / (1 + ceil((V - 1) / 4))",
            value=oracle.queries / leakage.row_queries(vocab, 5),
            limit=1.0,
        ),
    ]
    return record, bars


def run(options: _suite.Options) -> _suite.Result:
    clients, seconds, count = (8, 3, 40) if options.smoke else (CLIENTS, SECONDS, FUZZED)
    count = int(os.environ.get("LOGITJAX_FUZZ", count))
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch)
        small_model(directory / "small", 1000)
        arguments = (f"--model={directory / 'small'}", "--max_length=64", "--max_tokens=16")
        with running(*arguments, "--slots=16", "--max_waiting=64") as (address, process):
            load = _load(address, process, clients, seconds)
            logging.info("load: %s", load)
            fuzz = _fuzz(address, process, count)
            logging.info("fuzz: %s", fuzz)
        audit, bars = _audit(directory / "wide", 1000 if options.smoke else 49_152)
    broken = load["5xx or broken"] + fuzz["5xx or broken"]
    bars = [
        _suite.Bar(name="5xx or broken answers", value=broken, limit=0),
        _suite.Bar(name="429 without Retry-After", value=load["429 without Retry-After"], limit=0),
        _suite.Bar(name="resident memory grew by", value=load["RSS grew by"], limit=0.05),
        *bars,
    ]
    return _suite.Result(rows=[load, fuzz, audit], bars=[] if options.smoke else bars)
