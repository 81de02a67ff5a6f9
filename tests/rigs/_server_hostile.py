"""Clients that would keep a server from its others: long prompts, silence, nonsense; its end."""

import collections
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from typing import Any

import numpy as np

from experiments.shared import suite
from experiments.shared.peers import serving
from tests.rigs import _tables
from tests.rigs._server_client import COMPLETIONS, JSON, connect, post

Found = tuple[list[dict[str, Any]], list[suite.Bar]]


def long_prompts(options: suite.Options, model: str) -> Found:
    """How quickly /health is answered while 50 prompts of a megabyte come in."""
    count, times = (5, 1) if options.smoke else (50, 4)
    words = "the quick brown fox jumps over the lazy dog; "
    rows = []
    with serving(f"--model={model}", "--max_waiting=64") as (address, _):
        longest = 1024 * 100
        for what, size in (("1 MB", (1 << 20) - 100), ("100 KB, all tokenised", longest)):
            body = json.dumps({"prompt": (words * (size // len(words) + 1))[:size]}).encode()
            seconds, codes = _health_beside(address, [body] * count * times, count)
            median, late = (1e3 * float(np.quantile(seconds, q)) for q in (0.5, 0.99))
            row = {"what": f"{count} prompts of {what} at a time, {count * times} in all"}
            row |= {"answers": _listed(codes), "/health asked": len(seconds)}
            rows.append(row | {"/health median, ms": median, "/health p99, ms": late})
    bar = suite.at_most("/health p99 under 50 prompts of 1 MB, ms", rows[0]["/health p99, ms"], 100)
    return rows, [bar]


# In a process of its own: the clients' interpreter lock is no part of what is measured.
_WATCH = """
import http.client, select, sys, time
connection = http.client.HTTPConnection(sys.argv[1], timeout=120)
while not select.select([sys.stdin], [], [], 0.005)[0]:
    start = time.perf_counter()
    connection.request("GET", "/health")
    connection.getresponse().read()
    print(time.perf_counter() - start)
"""


def _bomb(i: int) -> dict[str, Any]:
    patterns = [f"^(.*a.{{{i + k}}})$" for k in range(1, 30)]
    bombs: list[dict[str, Any]] = [
        {"type": "integer", "multipleOf": 1_000_003 + 2 * i},
        {"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]},
        {"type": "string", "pattern": f"((a{{1000}}){{1000}}){{{1000 + i}}}"},
        {"properties": {f"p{i}-{k}": {"type": "integer"} for k in range(900)}},
    ]
    return bombs[i % len(bombs)]


def bombs(options: suite.Options, model: str) -> Found:
    """How long short answers take: alone, beside four clients with slow schemas, or with none."""
    # Each kind has its turn in every round: what else the machine does meets all three.
    rounds, seconds = (1, 3.0) if options.smoke else (12, 5.0)
    times: dict[str, list[list[float]]] = {"alone": [], "beside others": [], "beside bombs": []}
    codes: collections.Counter = collections.Counter()
    numbers = itertools.count()

    def plain(until: float, latencies: list[float]) -> None:
        connection = connect(address)
        while time.monotonic() < until:
            start = time.perf_counter()
            status, _, _ = post(connection, {"prompt": [5, 6, 7], "max_tokens": 4, "seed": 1})
            if status == 200:
                latencies.append(time.perf_counter() - start)

    def others(until: float, slow: bool) -> None:
        connection = connect(address, 600)
        while time.monotonic() < until:
            body: dict[str, Any] = {"prompt": [5], "max_tokens": 8}
            if slow:
                schema = {"json_schema": {"schema": _bomb(next(numbers))}}
                body["response_format"] = {"type": "json_schema"} | schema
            status = post(connection, body)[0]
            codes[status] += slow

    with serving(f"--model={model}", "--slots=8", "--max_length=128") as (address, _):
        for kind in list(times) * rounds:
            until, latencies = time.monotonic() + seconds, []
            with concurrent.futures.ThreadPoolExecutor(7) as pool:
                asked = [pool.submit(plain, until, latencies) for _ in range(3)]
                if kind != "alone":
                    asked += [pool.submit(others, until, "bombs" in kind) for _ in range(4)]
                for each in asked:
                    each.result()
            times[kind].append(latencies)
    rows, late = [], {}
    for kind, latencies in times.items():
        # Of each round, then of the rounds: a hiccup of the machine is one round's.
        by_round = 1e3 * np.array([np.quantile(each, [0.5, 0.99]) for each in latencies])
        median, late[kind] = np.median(by_round, axis=0).tolist()
        row = {"short answers": kind, "number": sum(map(len, latencies)), "median, ms": median}
        row |= {
            "p99, ms": late[kind],
            "of rounds": f"{by_round[:, 1].min():.0f} to {by_round[:, 1].max():.0f}",
        }
        rows.append(row | {"schemas": _listed(codes) if "bombs" in kind else ""})
    name = "p99 of short answers beside slow schemas less p99 alone, ms"
    return rows, [suite.at_most(name, late["beside bombs"] - late["alone"], 100)]


def _health_beside(
    address: str, bodies: list[bytes], wide: int
) -> tuple[np.ndarray, collections.Counter]:

    def one(body: bytes) -> int:
        return post(connect(address), body)[0]

    watcher = subprocess.Popen(
        [sys.executable, "-c", _WATCH, address.removeprefix("http://")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(0.5)
    with concurrent.futures.ThreadPoolExecutor(wide) as pool:
        codes = collections.Counter(pool.map(one, bodies))
    seconds, _ = watcher.communicate("over\n")
    return np.array(seconds.split(), float), codes


def gaps(options: suite.Options, model: str) -> Found:
    """The longest that streams wait for a token, alone and beside a prompt of 900 tokens."""
    rounds = 1 if options.smoke else 5
    seconds = 1.5 if options.smoke else 8.0
    rows = []
    with serving(f"--model={model}", "--max_length=1024", "--prefix_cache_mb=0") as (address, _):
        for round_ in range(rounds):
            arrivals: list[list[float]] = [[] for _ in range(4)]
            over = threading.Event()

            def follow(i: int, arrivals: Any = arrivals, over: Any = over) -> None:
                while not over.is_set():
                    _follow(address, arrivals[i], over)

            rng = np.random.default_rng(round_)
            body = {"prompt": rng.integers(1, 250, 900).tolist(), "max_tokens": 1}
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                for i in range(4):
                    pool.submit(follow, i)
                # Programs are compiled once all of them have had some tokens.
                while min(map(len, arrivals)) < 20:
                    time.sleep(0.05)
                begun = time.monotonic()
                time.sleep(seconds)
                asked = time.monotonic()
                status, _, _ = post(connect(address), body)
                answered = time.monotonic()
                # As long as the prompt took at least, so that both had as much time for a hiccup.
                time.sleep(max(0.0, seconds - (answered - asked)))
                ended = time.monotonic()
                over.set()
            alone = _largest_gap(arrivals, begun, asked)
            beside = _largest_gap(arrivals, asked, ended)
            row = {"status": status, "900 tokens answered in, s": answered - asked}
            row |= {"largest gap alone, s": alone, "beside it, s": beside}
            rows.append(row | {"ratio": beside / alone})
    median = float(np.median([row["ratio"] for row in rows]))
    bar = suite.at_most("largest gap of streams beside a prompt of 900 tokens / alone", median, 3)
    return rows, [bar]


def _follow(address: str, arrivals: list[float], over: threading.Event) -> None:
    body = {"prompt": [72, 101], "max_tokens": 256, "stream": True, "temperature": 1.0}
    connection = connect(address)
    connection.request("POST", COMPLETIONS, json.dumps(body), JSON)
    answer = connection.getresponse()
    # A new answer's first token waits for its prompt: gaps are those within an answer.
    arrivals.append(float("nan"))
    for line in answer:
        if line.startswith(b"data: {"):
            arrivals.append(time.monotonic())
        if over.is_set():
            break
    connection.close()


def _largest_gap(arrivals: list[list[float]], start: float, end: float) -> float:
    largest = 0.0
    for times in arrivals:
        for before, after in itertools.pairwise(times):
            if before < end and after > start:
                largest = max(largest, after - before)
    return largest


def half_open(options: suite.Options, directory: pathlib.Path) -> Found:
    """Answers for others while a thousand connections never finish their heads."""
    count = 300 if options.smoke else 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    served, seconds = 0, []
    flags = (f"--model={directory}", "--max_length=64")
    with serving(*flags, files=256) as (address, process), contextlib.ExitStack() as stack:
        host, port = address.removeprefix("http://").split(":")
        for _ in range(count):
            connection = socket.create_connection((host, int(port)), timeout=30)
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            stack.enter_context(connection)
        for i in range(50):
            start = time.perf_counter()
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, _, _ = post(connect(address, 60), {"prompt": [i + 1], "max_tokens": 2})
                served += status == 200
            seconds.append(time.perf_counter() - start)
        alive = process.poll() is None
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    row = {"half-open connections": count, "others served, of 50": served}
    row |= {"median, s": float(np.median(seconds)), "slowest, s": max(seconds), "alive": alive}
    name = "half-open connections at 256 files: others not served"
    return [row], [suite.at_most(name, 50 - served, 0)]


def ended_by_signal(options: suite.Options, directory: pathlib.Path) -> Found:
    """SIGTERM among streams: how each of them ends."""
    count = 12 if options.smoke else 60
    flags = (f"--model={directory}", "--max_length=1024", "--max_tokens=900", "--drain_seconds=2")
    with serving(*flags, "--slots=8", "--max_waiting=64") as (address, process):
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            streams = [pool.submit(_finish, address, seed) for seed in range(count)]
            time.sleep(1.0)
            process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            ends = collections.Counter(stream.result() for stream in streams)
        process.wait(timeout=60)
        seconds = time.monotonic() - start
    row = {"streams": count, "ends": _listed(ends), "stopped after, s": seconds}
    # Who comes when nobody listens any more has no stream.
    without = count - ends["length"] - ends["stop"] - ends["refused"]
    return [row], [suite.at_most("SIGTERM: streams without a finish_reason", without, 0)]


def _finish(address: str, seed: int) -> str:
    body = {"prompt": [5], "max_tokens": 900, "stream": True, "seed": seed, "temperature": 2.0}
    request = urllib.request.Request(address + COMPLETIONS, json.dumps(body).encode(), JSON)
    reason = "nothing"
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    reason = choice["finish_reason"] or "cut"
    except (OSError, http.client.HTTPException) as error:
        refused = isinstance(getattr(error, "reason", None), ConnectionRefusedError)
        return "refused" if refused else type(error).__name__
    return reason


_TABLE = _tables.read("nonsense")
_FIELDS, _SENSIBLE = _TABLE["fields"], _TABLE["sensible"]
# Values, as JSON text, that no field is made for; one is an object of many keys.
_NASTY = [*map(_tables.text, _TABLE["values"]), json.dumps(dict.fromkeys(range(3000), 1))]


def nonsense(rng: np.random.Generator) -> tuple[str, bytes]:
    """A path, and a body with some fields that make sense and some that do not."""
    chat = rng.random() < 0.3
    fields = {name: text for name, text in _SENSIBLE.items() if rng.random() < 0.5}
    fields.setdefault("prompt", '"a"')
    if chat:
        fields["messages"] = '[{"role": "user", "content": "a"}]'
    for _ in range(int(rng.integers(1, 4))):
        # Not `choice`, which would make an array of all of them, each as long as the longest.
        fields[_FIELDS[rng.integers(len(_FIELDS))]] = _NASTY[rng.integers(len(_NASTY))]
    text = "{" + ",".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
    raw = text.encode()
    kind = rng.random()
    if kind < 0.05:
        raw = raw[: int(rng.integers(0, len(raw)))]
    elif kind < 0.1:
        raw = bytes(rng.permutation(np.frombuffer(raw[:2000], np.uint8)))
    elif kind < 0.12:
        raw = rng.bytes(int(rng.integers(0, 300)))
    return "/v1/chat/completions" if chat else COMPLETIONS, raw


def fuzz(options: suite.Options, directory: pathlib.Path, count: int) -> Found:
    """Requests that are nearly right, and some that are none."""
    clients = 8
    codes: collections.Counter = collections.Counter()
    wrong: collections.Counter = collections.Counter()
    lock = threading.Lock()

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        connection = connect(address)
        for _ in range(count // clients):
            path, raw = nonsense(rng)
            try:
                connection.request("POST", path, raw, JSON)
                answer = connection.getresponse()
                status, text = answer.status, answer.read()
            except (OSError, http.client.HTTPException) as error:
                status, text = 599, repr(error).encode()
                connection.close()
            with lock:
                codes[status] += 1
                if status >= 500:
                    wrong[text[:100] + b" to " + raw[:300]] += 1
                elif status != 200 and not _is_error(text):
                    wrong[b"no error in OpenAI's form: " + text[:100]] += 1

    flags = (f"--model={directory}", "--max_length=64", "--bias=sampling", "--max_tokens=8")
    with serving(*flags, "--slots=16", "--max_waiting=64") as (address, process):
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))
        alive = process.poll() is None
    for body, times in wrong.most_common(5):
        print(f"{times} x {body!r}")
    row = {"what": "requests with fields that make no sense", "requests": sum(codes.values())}
    row |= {"answers": _listed(codes), "alive": alive}
    broken = sum(n for code, n in codes.items() if code >= 500)
    return [row], [
        suite.at_most("fuzzed requests: answers of 5xx", broken, 0),
        suite.at_most("fuzzed requests: errors in another form", len(wrong), 0),
    ]


def _listed(counts: collections.Counter) -> str:
    return " ".join(f"{count} x {name}" for name, count in sorted(counts.items()))


def _is_error(text: bytes) -> bool:
    try:
        return bool(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return False
