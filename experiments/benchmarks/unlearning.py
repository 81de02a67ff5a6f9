"""Unlearning: an assistant's training step beside NPO + KL, and decoding with and without it.

    python -m experiments.benchmark unlearning

SmolLM2-135M, an assistant of its first 8 of 30 layers, batches of the same tokens to forget and to
keep. A step is forward, backward and AdamW: ``npo_kl`` trains all weights and runs the frozen
reference; ``assistant`` trains adapters of rank 32 on frozen weights. MiB: arguments, new results
and scratch of the compiled step, so weights, optimizer and reference model count. Decoding is
greedy, prefill included, one row and eight: the target alone, target and assistant in one pass
(`unlearning.Assistant.beside`), and the two as separate models. ``over alone / (M + K) / M`` is the
cost over the target alone as a share of what layer counts predict. Parts that are done are kept.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from experiments.shared import records, suite, timing
from experiments.unlearning.train import planned_bytes
from logitjax import decoding, fusion, models, training, unlearning

_FASTER, _SMALLER, _DECODE = 3.0, 0.5, 1.15


def run(options: suite.Options) -> suite.Result:
    spec, layers, rows, length, new = (
        ("tiny", 1, 2, 16, 4) if options.smoke else ("smollm2", 8, 4, 96, 32)
    )
    model, _ = models.load(spec, layout="listed")
    model = models.with_layout(model, "listed")
    parts = epath.Path(options.directory) / f"{options.scale}-parts"

    def part(name: str, make: Callable[..., Any], *sizes: int) -> Any:
        measure = functools.partial(make, model, layers, *sizes, options.repeats)
        return records.kept(parts / f"{name}.json", measure)

    steps = part("steps", _steps, rows, length)
    table = list(steps["rows"])
    bars = [
        suite.at_least("NPO + KL step / assistant step, seconds", steps["faster"], _FASTER),
        suite.at_most("assistant step / NPO + KL step, memory", steps["smaller"], _SMALLER),
    ]
    for batch in (1,) if options.smoke else (1, 8):
        found = part(f"decode-{batch}", _decode, batch, new)
        table += found["rows"]
        name = f"decoding over alone / (M + K) / M, B = {batch}"
        bars.append(suite.at_most(name, found["share"], _DECODE))
    parts.rmtree()
    return suite.Result(rows=table, bars=bars)


def _batch(model: models.Decoder, rows: int, length: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def side() -> dict[str, np.ndarray]:
        tokens = rng.integers(3, model.config.vocab_size, (rows, length)).astype(np.int32)
        mask = np.broadcast_to(np.arange(length) >= length // 3, tokens.shape)
        return {"tokens": tokens, "mask": np.ascontiguousarray(mask)}

    return {"forget": side(), "retain": side()}


def _steps(
    model: models.Decoder, layers: int, rows: int, length: int, repeats: int
) -> dict[str, Any]:
    """Seconds and planned memory of a step of either."""
    mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
    batch = training.BatchLayout(mesh).place(_batch(model, rows, length))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assistant = unlearning.Assistant.init(model, layers, key=jax.random.key(0))
    methods = unlearning.METHODS
    silent, base = methods.parse(f"difference(layers={layers}, relative=False)").make_loss(model)
    npo_kl, before = methods.parse("npo_kl").make_loss(model)
    calls: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    for name, loss_fn, start, constants in (
        ("npo_kl", npo_kl, params, before),
        ("assistant", silent, assistant.lora, base),
    ):
        tx = training.Schedule(1e-5, "constant").optimizer(weight_decay=0.01)
        state = training.TrainState.create(start, tx, mesh=mesh)
        step = training.TrainStep(loss_fn, tx, mesh=mesh)
        sizes[name] = planned_bytes(step.lower(state, batch, constants).compile())
        calls[name] = timing.repeated(step, state, batch, constants)
    seconds = timing.paired_seconds(calls, repeats=repeats)
    table = [
        {
            "what": f"step: {name}",
            "B": 2 * rows,
            "ms": 1e3 * float(np.median(taken)),
            "tokens/s": 2 * rows * length / float(np.median(taken)),
            "MiB": sizes[name] / 2**20,
            "over npo_kl": timing.paired_ratio(taken, seconds["npo_kl"]),
        }
        for name, taken in seconds.items()
    ]
    return {
        "rows": table,
        "faster": timing.paired_ratio(seconds["npo_kl"], seconds["assistant"]),
        "smaller": sizes["assistant"] / sizes["npo_kl"],
    }


def _decode(
    model: models.Decoder, layers: int, batch: int, new: int, repeats: int
) -> dict[str, Any]:
    """Seconds of ``new`` tokens, and how they compare with what layer counts predict."""
    assistant = unlearning.Assistant.init(model, layers, key=jax.random.key(0))
    fuse = fusion.LogitDifference()
    apart = assistant.lora.merged_into(assistant.base)
    line_ups: Mapping[str, Any] = {
        "target alone": decoding.Ensemble(model),
        "with its assistant, one pass": decoding.Ensemble(assistant.beside(model), fuse=fuse),
        "with its assistant, two models": decoding.Ensemble(model, experts=[apart], fuse=fuse),
    }
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, model.config.vocab_size, 12 + i) for i in range(batch)]
    calls = {
        name: lambda m=line_up: decoding.generate(m, prompts, max_new_tokens=new).tokens
        for name, line_up in line_ups.items()
    }
    seconds = timing.paired_seconds(calls, repeats=repeats)
    depth = model.config.num_layers
    predicted = (depth + layers) / depth
    table = []
    for name, taken in seconds.items():
        ratio = timing.paired_ratio(taken, seconds["target alone"])
        row: dict[str, Any] = {
            "what": f"decode: {name}",
            "B": batch,
            "ms": 1e3 * float(np.median(taken)) / new,
            "tokens/s": batch * new / float(np.median(taken)),
            "over alone": ratio,
        }
        if name != "target alone":
            row["over alone / (M + K) / M"] = ratio / predicted
        table.append(row)
    one_pass = seconds["with its assistant, one pass"]
    share = timing.paired_ratio(one_pass, seconds["target alone"]) / predicted
    return {"rows": table, "share": share}
