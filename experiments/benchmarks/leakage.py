"""Rows through a logit bias, and the head's subspace beside numpy's full SVD.

Rows of the subspace come from a head of the width and vocabulary of a 1.5-billion-parameter model
with a spectrum as uneven as SmolLM2's (s_1 / s_h about 700). Each method runs in a process of its
own, whose peak memory counts the rows.
"""

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import suite, timing
from logitjax import leakage

SPAN = 25.0

_SUBSPACE = """
import json, sys, time
import numpy as np
from experiments.shared.suite import peak_rss_bytes
from experiments.benchmarks.leakage import uneven_rows

vocab, hidden, count = map(int, sys.argv[2:5])
rows, head = uneven_rows(vocab, hidden, count)
start = time.perf_counter()
if sys.argv[1] == "ours":
    from logitjax import leakage
    found = leakage.estimate_output_subspace(rows, centre=False)
    dimension, basis = found.width.estimate, np.asarray(found.basis)
    method = "Gram matrix"
else:
    values, right = np.linalg.svd(rows, full_matrices=False)[1:]
    gaps = -np.diff(np.log(np.maximum(values, values[0] * 1.2e-7 * count)))
    skip = count // 20
    dimension = int(np.argmax(gaps[skip - 1 :])) + skip
    basis, method = right[:dimension].T, "numpy.linalg.svd"
seconds = time.perf_counter() - start
peak = peak_rss_bytes()
from logitjax import leakage
# A part of the head: all of it would take longer than what is measured.
some = np.random.default_rng(1).standard_normal((hidden, 8)).astype(np.float32)
aligned = leakage.align_head(basis[:, :dimension], head @ some, centre=False)
print(json.dumps(dict(
    method=method, seconds=seconds, peak=peak, dimension=dimension,
    lost=1 - aligned.overlap, rms=aligned.relative_rms)))
"""


def uneven_rows(vocab: int, hidden: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[count, vocab]`` and the head that made them."""
    keys = jax.random.split(jax.random.key(0), 2)
    scale = jnp.exp(-jnp.log(500.0) * jnp.arange(hidden) / hidden)
    states = jax.random.normal(keys[0], (count, hidden)) * scale
    head = jax.random.normal(keys[1], (vocab, hidden)) / hidden**0.5
    rows = jax.jit(lambda states, head: states @ head.T)(states, head)
    return np.asarray(rows), np.asarray(head)


def _subspace(options: suite.Options) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    sizes = (4_000, 32, 80) if options.smoke else (152_064, 1024, 2048)
    rows, seen = [], {}
    for name in ("ours", "numpy"):
        command = [sys.executable, "-c", _SUBSPACE, name, *map(str, sizes)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seen[name] = json.loads(done.stdout.splitlines()[-1])
        found = seen[name]
        row = {"what": f"subspace, n = {sizes[2]}", "V": sizes[0], "h": sizes[1]}
        row |= {"method": found["method"], "seconds": found["seconds"]}
        row |= {"peak RSS GB": found["peak"] / 1e9, "dimension": found["dimension"]}
        rows.append(row | {"overlap lost": found["lost"]})
    ours, peer = seen["ours"], seen["numpy"]
    bars = [
        suite.at_least("subspace: numpy's seconds / ours", peer["seconds"] / ours["seconds"], 10.0),
        suite.at_most("subspace: peak memory, GB", ours["peak"] / 1e9, 3.0),
        suite.at_most("subspace: width off by", abs(ours["dimension"] - sizes[1]), 0),
        suite.at_most("subspace: overlap lost beyond numpy's", ours["lost"] - peer["lost"], 1e-6),
    ]
    return rows, bars


def _recovery(options: suite.Options) -> tuple[dict[str, Any], list[suite.Bar]]:
    vocab = 1_000 if options.smoke else 49_152
    logits = np.random.default_rng(0).standard_normal(vocab)
    logits = (logits - logits.mean()) / np.ptp(logits) * SPAN
    truth = logits - np.log(np.exp(logits).sum())
    table = jnp.asarray(logits, jnp.float32)[None]
    policy = leakage.LogitPolicy(top_k=5, bias="reported", decimals=7)
    oracle = leakage.LogitOracle(lambda tokens: table[tokens[:, -1]], policy)
    seconds = timing.paired_seconds(
        {"row": lambda: leakage.recover_log_probs(oracle, [0], vocab)}, repeats=1, warmup=1
    )["row"][0]
    spent = oracle.queries
    row = leakage.recover_log_probs(oracle, [0], vocab)
    error = float(np.abs(row.log_probs - truth)[row.known].max())
    price = policy.row_queries(vocab)
    record = {"what": "row from the top 5 and a bias", "V": vocab, "method": row.method}
    record |= {"seconds": seconds, "queries": row.queries, "coverage": row.coverage}
    record["error, nats"] = error
    bars = [
        suite.at_most("row: largest error, nats", error, 5e-6),
        suite.at_least("row: coverage", row.coverage, 1.0),
        suite.at_most(
            "row: queries / (1 + ceil((V - 1) / 4))", (oracle.queries - spent) / price, 1.0
        ),
    ]
    return record, bars


def run(options: suite.Options) -> suite.Result:
    row, found = _recovery(options)
    rows, bars = _subspace(options)
    return suite.Result(rows=[row, *rows], bars=found + ([] if options.smoke else bars))
