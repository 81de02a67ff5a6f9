"""Time what the papers claim about cost: `python -m experiments.costs PART --workdir=DIR`.

`closed_form` is InfiGFusion's number on graphs of ever more nodes. `vq` is the head of VQ-Logits
beside a full one of SmolLM2's size, with 491 codes, at 1, 16 and 256 positions: the product with
the rows, the same written out to the vocabulary (`logits`), and the first 40 of that (`top`).
"""

import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.shared.timing import paired_ratio, paired_seconds
from logitjax import ops, transport

ROUNDS = 10
_K = 10


def _closed_form() -> dict[str, list[float]]:
    """The exponent of time in the number of nodes, from 2^14 on: less is the price of a call."""

    @functools.partial(jax.jit, static_argnames="n")
    def closed_form(values: Any, ids: Any, n: int) -> Any:
        sides = (transport.graph_features(v, i, num_nodes=n) for v, i in zip(values, ids))
        return transport.sorted_gw_lower_bound(*sides)

    sizes, calls = [2**power for power in (14, 15, 16, 17, 18)], {}
    for n in sizes:
        rng = np.random.default_rng(0)
        values = np.abs(rng.normal(size=(2, n // _K, _K))).astype(np.float32)
        # Frequent tokens first, as in text.
        ids = (n * rng.random(values.shape) ** 3).astype(np.int32)
        calls[str(n)] = functools.partial(closed_form, jnp.array(values), jnp.array(ids), n=n)
    slopes = []
    for _ in range(ROUNDS):
        seconds = paired_seconds(calls, repeats=5)
        medians = [np.median(seconds[str(n)]) for n in sizes]
        slopes.append(float(np.polyfit(np.log(sizes), np.log(medians), 1)[0]))
    return {"closed_form": slopes}


def _vq() -> dict[str, list[float]]:
    """How many times faster than the full head, at every number of positions."""
    vocab, width, codes = 49_152, 576, 491
    rng = np.random.default_rng(0)
    full, few = (jnp.array(rng.normal(size=(n, width)), jnp.float32) for n in (vocab, codes))
    assignment = jnp.array(rng.integers(0, codes, vocab))

    def head(rows: Any, hidden: Any, stage: str, where: Any = None) -> Any:
        logits = hidden @ rows.T
        if where is not None and stage != "product":
            logits = logits[:, where]
        return ops.top_k(logits, 40) if stage == "top" else logits

    found: dict[str, list[float]] = {}
    for stage, positions in itertools.product(("product", "logits", "top"), (1, 16, 256)):
        hidden = jnp.array(rng.normal(size=(positions, width)), jnp.float32)
        step = jax.jit(functools.partial(head, stage=stage))
        calls = {
            "full": functools.partial(step, full, hidden),
            "vq": functools.partial(step, few, hidden, where=assignment),
        }
        rounds = [paired_seconds(calls, repeats=5) for _ in range(ROUNDS)]
        found[f"{stage}_{positions}"] = [paired_ratio(one["full"], one["vq"]) for one in rounds]
    return found


PARTS: Mapping[str, Callable[[], dict[str, list[float]]]] = {"closed_form": _closed_form, "vq": _vq}


def main(argv: list[str]) -> None:
    """The command; what is there is not measured again."""
    place = pathlib.Path(flags.FLAGS.workdir) / "rounds.json"
    if not place.exists():
        found = PARTS[argv[1]]()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(found, indent=1) + "\n")
    print(place.read_text())


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/costs", "Folder of the rounds.")
    app.run(main)
