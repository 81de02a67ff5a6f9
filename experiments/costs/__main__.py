"""Time what the papers claim about cost: `python -m experiments.costs PART --workdir=DIR`.

`closed_form` times InfiGFusion's number on ever larger graphs. `vq` times the head of VQ-Logits
beside a full one of SmolLM2's size, with 491 codes, at 1, 16 and 256 positions: the same logits
written out to the vocabulary (`logits`), and the first 40 of them (`top`). `fusion` relates the
paper's search for alpha to the forward passes of a decoding step, for 1 and 16 rows. `unlearning`
relates an update of all weights by NPO to one of the assistant whose logits are subtracted. These
two count CPU-seconds.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath

from experiments.dynamic_fusion.config import Config as FusionConfig
from experiments.forgetting import programs as forgetting
from experiments.forgetting.config import ALL, PRESETS
from experiments.forgetting.config import Config as ForgettingConfig
from experiments.shared.fusion_steps import decoding_step, made_up_logits
from experiments.shared.records import kept
from experiments.shared.scaling import closed_form_rows
from experiments.shared.timing import paired_ratio, paired_seconds, repeated
from logitjax import fusion, models, ops, training

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


def _fusion() -> dict[str, list[float]]:
    """The search's share of large model, expert and base, with twelve layers each of the two."""
    large, _ = models.load("smollm2", layout="listed")
    named = {"large": large, "small": models.keep_layers(large, FusionConfig().small_layers)}
    search = fusion.DynamicFusion(method="grid")
    alphas = jax.jit(lambda *logits: search(*logits)[1]["alpha"])
    entries = {}
    for rows in (1, 16):
        logits = made_up_logits(rows, large.config.vocab_size)
        calls = {name: decoding_step(one, rows) for name, one in named.items()}
        calls["search"] = functools.partial(alphas, *logits)
        shares = entries[f"search_{rows}"] = []
        for _ in range(_ROUNDS):
            one = paired_seconds(calls, repeats=_REPEATS, clock=time.process_time)
            steps = [large + 2 * small for large, small in zip(one["large"], one["small"])]
            shares.append(paired_ratio(one["search"], steps))
    return entries


def _unlearning() -> dict[str, list[float]]:
    """How many times longer an update of the whole model takes, for rows of 128 tokens."""
    methods = ("difference", f"npo_gradient_difference{ALL}")
    changes: Any = dict(method=methods, max_length=128, dtype="float32")
    config = ForgettingConfig(**PRESETS["report"] | changes)

    def made(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        # Masks are true, and how long a product takes does not depend on its numbers.
        return jnp.full(leaf.shape, leaf.dtype == jnp.bool_, leaf.dtype)

    updates: Any = forgetting.programs(config, training.make_mesh(config.mesh, partial=True))
    calls = {
        one.name: repeated(one.jitted, *jax.tree.map(made, one.arguments))
        for one in itertools.islice(updates, len(methods))
    }
    seconds = paired_seconds(calls, repeats=_ROUNDS, clock=time.process_time)
    small, large = (seconds[f"update of {name}"] for name in methods)
    return {"step": [a / b for a, b in zip(large, small)]}


_PARTS: Mapping[str, Callable[[], Any]] = {
    one.__name__[1:]: one for one in (_closed_form, _vq, _fusion, _unlearning)
}


def main(argv: list[str]) -> None:
    """The command; finished measurements are not repeated."""
    path = epath.Path(flags.FLAGS.workdir) / "rounds.json"
    print(json.dumps(kept(path, _PARTS[argv[1]]), indent=1))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/costs", "Folder of the rounds.")
    app.run(main)
