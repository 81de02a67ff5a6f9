"""Dynamic fusion: the cost of choosing alpha beside the paper's grid and the forward passes.

    python -m experiments.benchmark fusion

``paper's grid`` is the search as published: at each of 21 alphas a softmax and two KL divergences,
one alpha after another. ``grid`` is the same search from cumulants, the others are the root
searches of `DynamicFusion`. Each returns the alphas alone. Logits are synthetic, with the heavy
tail of language models; ``at bound`` and ``sweeps`` describe the searches. Two more bars relate the
default search to one decoding step of SmolLM2 with a 6-layer expert and base.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.shared import suite, timing
from experiments.shared.fusion_steps import decoding_step, made_up_logits
from logitjax import models
from logitjax.fusion import DynamicFusion

_GRID_LIMIT, _FORWARD_LIMIT = 1 / 3, 0.08
_METHODS = ("grid", "jeffreys", "project")
_SMALL_LAYERS = (0, 1, 2, 3, 28, 29)
_DEFAULT = DynamicFusion().method


def run(options: suite.Options) -> suite.Result:
    vocabularies = (1024,) if options.smoke else (49_152, 152_064)
    batches = (1,) if options.smoke else (1, 16)
    rows: list[dict[str, Any]] = []
    bars: list[suite.Bar] = []
    default: dict[int, float] = {}
    for vocab in vocabularies:
        for batch in batches:
            logits = made_up_logits(batch, vocab)
            calls = _calls(logits)
            seconds = timing.paired_seconds(calls, repeats=options.repeats)
            for name, taken in seconds.items():
                ratio = timing.paired_ratio(taken, seconds["paper's grid"])
                row = {"vocab": vocab, "batch": batch, "search": name}
                row |= {"ms": 1e3 * statistics.median(taken), "over paper's grid": ratio}
                row["over grid"] = timing.paired_ratio(taken, seconds["grid"])
                rows.append(row | _info(name, logits))
                if name == _DEFAULT:
                    text = f"{name} / paper's grid, V={vocab}, B={batch}"
                    bars.append(suite.at_most(text, ratio, _GRID_LIMIT))
                    if vocab == vocabularies[0]:
                        default[batch] = statistics.median(taken)
    for batch in batches:
        row, forward = _forwards(batch, options)
        rows.append(row)
        if not options.smoke:
            text = f"{_DEFAULT} / forward passes, B={batch}"
            share = default[batch] / forward
            bars.append(suite.at_most(text, share, _FORWARD_LIMIT))
    return suite.Result(rows=rows, bars=bars)


@jax.jit
def papers_grid(large: jax.Array, expert: jax.Array, base: jax.Array) -> jax.Array:
    """Algorithm 1 for one expert, as written."""
    p, q, r = (jax.nn.log_softmax(x) for x in (large, expert, base))

    def kl(first: jax.Array, second: jax.Array) -> jax.Array:
        return (jnp.exp(first) * (first - second)).sum(-1)

    forward, reverse = kl(q, r), kl(r, q)

    def objective(alpha: jax.Array) -> jax.Array:
        fused = jax.nn.log_softmax(large + alpha * (expert - base))
        return (kl(fused, p) - forward) ** 2 + (kl(p, fused) - reverse) ** 2

    alphas = jnp.linspace(0, 2, 21)
    return alphas[lax.map(objective, alphas).argmin(0)]


def _calls(logits: tuple[jax.Array, ...]) -> dict[str, Callable[[], Any]]:
    def alphas(method: Any) -> Callable[..., jax.Array]:
        return jax.jit(lambda *logits: DynamicFusion(method=method)(*logits)[1]["alpha"])

    functions: dict[str, Callable[..., Any]] = {"paper's grid": papers_grid}
    functions |= {name: alphas(name) for name in _METHODS}
    return {name: lambda f=f: f(*logits) for name, f in functions.items()}


def _info(name: Any, logits: tuple[jax.Array, ...]) -> dict[str, Any]:
    if name not in _METHODS:
        return {}
    info = jax.jit(lambda *logits: DynamicFusion(method=name)(*logits)[1])(*logits)
    return {
        "sweeps": int(info["sweeps"]),
        "at bound": float(info["at_bound"].mean()),
        "converged": float(info["converged"].mean()),
    }


def _forwards(batch: int, options: suite.Options) -> tuple[dict[str, Any], float]:
    """Seconds of one decoding step of the large model, an expert and a base together."""
    if options.smoke:
        large, vocab = models.load_model("tiny"), 257
        small = models.keep_layers(large, (0,))
    else:
        large, _ = models.load("smollm2", layout="listed")
        small = models.keep_layers(large, _SMALL_LAYERS)
        vocab = large.config.vocab_size
    steps = {
        name: decoding_step(model, batch) for name, model in (("large", large), ("small", small))
    }
    seconds = timing.paired_seconds(steps, repeats=options.repeats)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    total = medians["large"] + 2 * medians["small"]
    return {"vocab": vocab, "batch": batch, "search": "(forward passes)", "ms": 1e3 * total}, total
