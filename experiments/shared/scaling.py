"""Seconds and memory of the Gromov-Wasserstein closed form on graphs of ever more nodes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.shared import suite, timing
from logitjax import transport

# Token nodes a position.
_K = 10


def timed(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    answer = jax.block_until_ready(function())
    seconds = timing.paired_seconds({"it": function}, repeats=repeats, warmup=0)["it"]
    return answer, float(np.median(seconds))


def closed_form_rows(sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row a size: n token nodes, ten a position and n / 10 positions; no n x n array anywhere."""

    def closed_form(v, v_ids, w, w_ids, n):
        f, g = (
            transport.graph_features(x, ids, num_nodes=n) for x, ids in ((v, v_ids), (w, w_ids))
        )
        return transport.sorted_gw_lower_bound(f, g)

    rows = []
    for n in sizes:
        rng = np.random.default_rng(0)
        positions = max(1, n // _K)
        v, w = np.abs(rng.normal(size=(2, positions, _K))).astype(np.float32)
        # Frequent tokens first, as in text.
        v_ids, w_ids = (n * rng.random((2, positions, _K)) ** 3).astype(np.int32)
        function = functools.partial(closed_form, n=n)
        step = jax.jit(function)
        _, seconds = timed(functools.partial(step, v, v_ids, w, w_ids), repeats)
        memory = suite.temp_bytes(function, v, v_ids, w, w_ids)
        row = {"graph": "scaling", "n": n, "method": "closed form"}
        rows.append(row | {"seconds": seconds, "MiB": memory / 2**20})
    return rows
