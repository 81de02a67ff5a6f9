"""Bounds of many pairs: `certificate_many` beside a loop over `certificate`, each in a new process.

    python -m experiments.benchmark many_gromov_wasserstein

1,000 pairs at n = 64, as factors of width 32 and as matrices. CPU-seconds include compilation,
which no cache keeps between processes, but not making the pairs.
"""

import time
from typing import Any

import jax
import numpy as np

from experiments.shared import suite
from logitjax import transport

_WIDTH = 32
_WAYS = ("certificate_many", "loop")


def run(options: suite.Options) -> suite.Result:
    pairs, n = (10, 8) if options.smoke else (1000, 64)
    rows: list[dict[str, Any]] = []
    bars = []
    for form in ("factors", "matrices"):
        seconds = {way: suite.in_fresh_process(cpu_seconds, form, way, pairs, n) for way in _WAYS}
        ratio = seconds["loop"] / seconds["certificate_many"]
        rows += [
            {"pairs": pairs, "n": n, "form": form, "way": way, "CPU-seconds": seconds[way]}
            for way in _WAYS
        ]
        bars.append(suite.at_least(f"{form}: pairs a CPU-second / those of a loop", ratio, 20))
        print(rows[-2:], flush=True)
    return suite.Result(rows=rows, bars=bars)


def cpu_seconds(form: str, way: str, pairs: int, n: int) -> float:
    """CPU-seconds of this process for the bounds of all pairs."""
    jax.config.update("jax_enable_compilation_cache", False)
    rng = np.random.default_rng(0)
    graphs: list[tuple[Any, Any]] = []
    for _ in range(pairs):
        z, w = rng.normal(size=(2, _WIDTH, n)).astype(np.float32)
        factored = transport.FactoredGraph(z), transport.FactoredGraph(w)
        graphs.append(factored if form == "factors" else (z.T @ z, w.T @ w))
    start = time.process_time()
    if way == "loop":
        for pair in graphs:
            transport.certificate(*pair)
    else:
        transport.certificate_many(graphs)
    return time.process_time() - start
