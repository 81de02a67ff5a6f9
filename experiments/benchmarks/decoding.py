"""Tokens a second of decoding: one model beside transformers, several models beside one.

    python -m experiments.benchmark decoding

SmolLM2 in float32, greedy, prompts of 10 to 24 tokens, 64 new tokens, prefill included, compilation
not. If the interpreter in ``LOGITJAX_TORCH_PYTHON`` has torch and transformers, its ``generate``
takes turns with ours in its own process, with as many threads. Fused decoding takes SmolLM2 as the
large model and cuts of 6 of its layers as experts and base.
"""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import peers, suite, timing
from logitjax import fusion, models
from logitjax.decoding import Ensemble, generate

_BARS = {1: 1.0, 8: 0.95}


def run(options: suite.Options) -> suite.Result:
    new = 4 if options.smoke else 64
    spec = "tiny" if options.smoke else "smollm2"
    model, tokenizer = models.load(spec, layout="listed")
    text = tokenizer.encode((Path(__file__).parents[2] / "LICENSE").read_text())
    prompts = [np.array(text[40 * i :][: 10 + 2 * i], np.int32) for i in range(8)]
    alone = Ensemble(model)
    rows: list[dict[str, Any]] = []
    bars: list[suite.Bar] = []
    script = Path(__file__).with_name("_decoding_torch.py")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        models.save_pretrained(model, tokenizer, directory)
        peer = stack.enter_context(peers.torch_peer(script, directory, new, smoke=options.smoke))
        for batch in (1, 8):
            given = prompts[:batch]
            calls: dict[str, Callable[[], Any]] = {
                "logitjax": lambda g=given: generate(alone, g, max_new_tokens=new)
            }
            if peer is not None:
                calls["transformers + torch"] = lambda g=given: peer([x.tolist() for x in g])
            seconds = timing.paired_seconds(calls, repeats=options.repeats)
            for name, times in seconds.items():
                ratio = timing.paired_ratio(seconds["logitjax"], times)
                rows.append(_row(name, batch, new, times) | {"ours / its seconds": ratio})
            if peer is not None:
                ours, other = seconds["logitjax"], seconds["transformers + torch"]
                name, ratio = (
                    f"tokens/s over torch's, B = {batch}",
                    timing.paired_ratio(other, ours),
                )
                bars.append(suite.at_least(name, ratio, _BARS[batch]))
    rows += _fused_rows(model, prompts, new, options)
    return suite.Result(rows=rows, bars=bars)


def _row(name: str, batch: int, new: int, seconds: list[float]) -> dict[str, Any]:
    median = float(np.median(seconds))
    speed = {"ms a step": 1e3 * median / new, "tokens/s": batch * new / median}
    return {"what": name, "B": batch, **speed}


def _fused_rows(
    model: models.Decoder, prompts: list[np.ndarray], new: int, options: suite.Options
) -> list[dict[str, Any]]:
    layers = model.config.num_layers
    small = [
        models.keep_layers(model, sorted({i, layers // 2, layers - 1, *range(min(2, layers))}))
        for i in range(min(3, layers))
    ]
    experts, base = small[:-1], small[-1:]
    fused: dict[str, Any] = {"experts": experts, "bases": base}
    rows = []
    for batch in (1,) if options.smoke else (1, 8):
        line_ups = {
            "large alone": Ensemble(model),
            "proxy": Ensemble(model, fuse=fusion.ProxyTuning(), **fused),
            "dynamic": Ensemble(model, fuse=fusion.DynamicFusion(), **fused),
            "dynamic, not stacked": Ensemble(
                model, fuse=fusion.DynamicFusion(), stack=False, **fused
            ),
        }
        calls = {
            name: lambda m=line_up, g=prompts[:batch]: generate(m, g, max_new_tokens=new).tokens
            for name, line_up in line_ups.items()
        }
        seconds = timing.paired_seconds(calls, repeats=options.repeats)
        for name, times in seconds.items():
            ratio = timing.paired_ratio(times, seconds["large alone"])
            count = 1 if name == "large alone" else 1 + len(small)
            row = _row(name, batch, new, times)
            rows.append(row | {"models": count, "over large alone": ratio})
    return rows
