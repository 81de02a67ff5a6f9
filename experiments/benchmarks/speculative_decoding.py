"""Speculative decoding beside plain decoding, from drafts that are never right to always right.

    python -m experiments.benchmark speculative_decoding

SmolLM2 in float32 with a cut of six of its layers as the expert that drafts, greedy, 64 new tokens
(32 for 8 rows).
Tokens are decoded from ``large + weight * expert``: at weight 0 drafts are constant and never
right; with growing weight they are right more often, at the same cost. *predicted*: time of a plain
run over that of as many rounds as there were, each a verifying pass and ``length`` drafting steps,
timed separately in between. *adaptive* chooses lengths by itself.

The rows *look-up* draft the earlier continuation of the last tokens, by SmolLM2 alone: on prose,
and on a paragraph that occurs twice and is begun a third time. Their speed-up is in processor time.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import suite, timing
from logitjax import decoding, models

_LAYERS = (0, 1, 2, 14, 28, 29)


@dataclasses.dataclass(frozen=True)
class _Weighted:
    """A model's function whose logits its parameters scale: no weight is compiled in."""

    apply: Callable[..., Any]

    def __call__(self, params: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        weight, params = params
        logits, cache = self.apply(params, *arguments, **options)
        return weight * logits, cache


def _sum(large: Any, experts: Any, bases: Any, vocab_where: Any = None) -> tuple[Any, dict]:
    return large + experts[0], {}


def _with_weight(small: decoding.CachedModel, weight: float) -> decoding.CachedModel:
    return dataclasses.replace(small, params=(jnp.float32(weight), small.params[1]))


def run(options: suite.Options) -> suite.Result:
    smoke = options.smoke
    model, tokenizer = models.load("tiny" if smoke else "smollm2", layout="listed")
    text = tokenizer.encode((Path(__file__).parents[2] / "LICENSE").read_text())
    prompts = [np.array(text[40 * i :][: 10 + 2 * i], np.int32) for i in range(8)]
    large = decoding.CachedModel.of(model)
    cut = decoding.CachedModel.of(models.keep_layers(model, [0] if smoke else _LAYERS))
    small = dataclasses.replace(cut, apply=_Weighted(cut.apply), params=(1.0, cut.params))
    rows: list[dict[str, Any]] = []
    for batch in (1,) if smoke else (1, 8):
        for weight in (1.0,) if smoke else (0.0, 1.0, 4.0, 64.0):
            rows += _rows(large, _with_weight(small, weight), prompts[:batch], weight, options)
    copies = _look_ups(decoding.Ensemble(large), np.array(text, np.int32), options)
    fixed = [row for row in rows if row["lengths"] != "adaptive"]
    adaptive = [row for row in rows if row["lengths"] == "adaptive"]
    name = "speed-up over what acceptance predicts, least of fixed lengths"
    least = min(row["speed-up"] for row in adaptive)
    bars = [
        suite.at_least(name, min(row["of predicted"] for row in fixed), 0.85),
        suite.at_least("adaptive over plain, least", least, 0.97),
    ]
    bars += [
        suite.at_least("look-up over plain, prose", copies[0]["speed-up"], 0.97),
        suite.at_least("look-up over plain, copies", copies[1]["speed-up"], 1.5),
    ]
    return suite.Result(rows=rows + copies, bars=[] if smoke else bars)


def _look_ups(
    alone: decoding.Ensemble, text: np.ndarray, options: suite.Options
) -> list[dict[str, Any]]:
    paragraph, new = text[300:420], 6 if options.smoke else 96
    prompts = {
        "prose": text[40:60],
        "copies": np.concatenate([paragraph, paragraph, text[300:308]]),
    }
    rows = []
    for name, prompt in prompts.items():
        control = decoding.DraftControl("prompt")
        ratios, outs = [], []
        # The first calls compile, and let the control settle.
        for turn in range(3 + options.repeats):
            spent = []
            for drafts in (None, control):
                start = time.process_time()
                out = decoding.generate(alone, [prompt], max_new_tokens=new, drafts=drafts)
                spent.append(time.process_time() - start)
                outs.append(out)
            ratios += [spent[0] / spent[1]] if turn > 2 else []
        row = {"B": 1, "lengths": f"look-up, {name}", "acceptance": outs[-1].drafting.acceptance}
        same = int((outs[-1].tokens == outs[-2].tokens).all())
        rows.append(row | {"speed-up": float(np.median(ratios)), "rows as plain": same})
    return rows


def _rows(
    large: decoding.CachedModel,
    small: decoding.CachedModel,
    prompts: list[np.ndarray],
    weight: float,
    options: suite.Options,
) -> list[dict[str, Any]]:
    batch, lengths = len(prompts), (2,) if options.smoke else (2, 5)
    new = 6 if options.smoke else 64 if batch == 1 else 32
    ensemble = decoding.Ensemble(large, experts=[small], fuse=_sum)
    alone = decoding.Ensemble(small)
    control = decoding.DraftControl(lengths=lengths)
    speculate = functools.partial(
        decoding.generate, ensemble, prompts, max_new_tokens=new, text=decoding.TextOptions(chunk=6)
    )
    last: dict[Any, Any] = {}

    def remember(name: Any, call: Callable[[], Any]) -> Callable[[], Any]:
        def remembered() -> Any:
            last[name] = call()
            return last[name].tokens

        return remembered

    plain = remember("plain", lambda: decoding.generate(ensemble, prompts, max_new_tokens=new))
    calls: dict[Any, Callable[[], Any]] = {
        "plain": plain,
        "one": lambda: decoding.generate(ensemble, prompts, max_new_tokens=1).tokens,
        "draft": lambda: decoding.generate(alone, prompts, max_new_tokens=new).tokens,
    }
    for length in lengths:
        fixed = decoding.DraftControl(lengths=length)
        calls[length] = remember(length, lambda d=fixed: speculate(drafts=d))
        calls["verify", length] = _verify(ensemble, batch, length + 1)
    seconds: dict[Any, Any] = timing.paired_seconds(calls, repeats=options.repeats)
    # The control's first calls compile and explore: it settles before it is timed.
    adaptive = remember("adaptive", lambda: speculate(drafts=control))
    settled: dict[Any, Any] = timing.paired_seconds(
        {"plain": plain, "adaptive": adaptive}, repeats=2 * options.repeats, warmup=2
    )
    rows = []
    for name in (*lengths, "adaptive"):
        out, taken = last[name], settled if name == "adaptive" else seconds
        drafting = out.drafting
        rounds = sum(rounds for _, rounds, _ in drafting.calls)
        row = {
            "B": batch,
            "weight": weight,
            "lengths": name,
            "acceptance": drafting.acceptance,
            "tokens a round": (out.lengths.max() - 1) / rounds,
            "tokens/s": batch * new / float(np.median(taken[name])),
            "speed-up": timing.paired_ratio(taken["plain"], taken[name]),
        }
        if name != "adaptive":
            draft = np.array(seconds["draft"]) / new
            verify = np.array(seconds["verify", name]) / _PASSES
            expected = np.array(seconds["one"]) + rounds * (int(name) * draft + verify)
            row |= {
                "predicted": timing.paired_ratio(seconds["plain"], expected.tolist()),
                "of predicted": timing.paired_ratio(expected.tolist(), seconds[name]),
            }
        row["rows as plain"] = int((out.tokens == last["plain"].tokens).all(axis=1).sum())
        rows.append(row)
    return rows


_PASSES = 4


def _verify(ensemble: decoding.Ensemble, rows: int, width: int) -> Callable[[], Any]:
    plan = ensemble.plan
    items = [plan.init_cache(rows, 128)]

    @functools.partial(jax.jit, donate_argnums=1)
    def forward(params: Any, cache: Any) -> tuple[jax.Array, Any]:
        positions = jnp.broadcast_to(32 + jnp.arange(width), (plan.streams, rows, width))
        logits, cache = plan.forward(params, jnp.zeros_like(positions), positions, cache)
        return plan.combine(logits)[0].argmax(axis=-1), cache

    def call() -> Any:
        for _ in range(_PASSES):
            chosen, items[0] = forward(ensemble.params, items[0])
            jax.block_until_ready(chosen)
        return chosen

    return call
