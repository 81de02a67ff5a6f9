"""Time what the papers claim about cost: `python -m experiments.costs PART --workdir=DIR`.

`closed_form` times InfiGFusion's number on ever larger graphs. `vq` times the head of VQ-Logits
beside a full one of SmolLM2's size, with 491 codes, at 1, 16 and 256 positions: the same logits
written out to the vocabulary (`logits`), and the first 40 of them (`top`).
"""

import functools
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath

from experiments.shared.records import kept
from experiments.shared.scaling import closed_form_rows
from experiments.shared.timing import paired_ratio, paired_seconds
from logitjax import ops

_ROUNDS, _REPEATS = 10, 5


def _closed_form() -> dict[str, list[float]]:
    """The exponent of time in the number of nodes; on small graphs it would measure the call."""
    slopes = []
    for _ in range(_ROUNDS):
        rows = closed_form_rows([2**power for power in range(14, 19)], _REPEATS)
        logs = np.log([[row["n"], row["seconds"]] for row in rows])
        slopes.append(float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0]))
    return {"closed_form": slopes}


def _vq() -> dict[str, list[float]]:
    """Speed-up over the full head, at every number of positions."""
    vocab, width, codes = 49_152, 576, 491
    rng = np.random.default_rng(0)
    full, few = (jnp.array(rng.normal(size=(n, width)), jnp.float32) for n in (vocab, codes))
    assignment = jnp.array(rng.integers(0, codes, vocab))

    def head(rows: Any, hidden: Any, where: Any = None, *, top: bool) -> Any:
        logits = hidden @ rows.T if where is None else (hidden @ rows.T)[:, where]
        return ops.top_k(logits, 40) if top else logits

    entries: dict[str, list[float]] = {}
    for stage, positions in itertools.product(("logits", "top"), (1, 16, 256)):
        hidden = jnp.array(rng.normal(size=(positions, width)), jnp.float32)
        step = jax.jit(functools.partial(head, top=stage == "top"))
        calls = {
            "full": functools.partial(step, full, hidden),
            "vq": functools.partial(step, few, hidden, assignment),
        }
        rounds = [paired_seconds(calls, repeats=_REPEATS) for _ in range(_ROUNDS)]
        entries[f"{stage}_{positions}"] = [paired_ratio(one["full"], one["vq"]) for one in rounds]
    return entries


_PARTS: Mapping[str, Callable[[], Any]] = {"closed_form": _closed_form, "vq": _vq}


def main(argv: list[str]) -> None:
    """The command; finished measurements are not repeated."""
    path = epath.Path(flags.FLAGS.workdir) / "rounds.json"
    print(json.dumps(kept(path, _PARTS[argv[1]]), indent=1))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/costs", "Folder of the rounds.")
    app.run(main)
