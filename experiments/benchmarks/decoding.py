"""Tokens a second of decoding: one model beside transformers, several models beside one.

    python -m experiments.benchmark decoding

SmolLM2 in float32, greedy, prompts of 10 to 24 tokens, 64 new tokens, prefill included, compilation
not. Where the interpreter in ``LOGITJAX_TORCH_PYTHON`` has torch and transformers, its ``generate``
takes turns with ours in a process of its own, with as many threads. Fused decoding takes SmolLM2 as
the large model and cuts of 6 of its layers as experts and base.
"""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import _suite
from experiments.shared import timing
from logitjax import fusion, models
from logitjax.decoding import Ensemble, generate

_BARS = {1: 1.0, 8: 0.95}


def run(options: _suite.Options) -> _suite.Result:
    new = 4 if options.smoke else 64
    spec = "tiny" if options.smoke else "smollm2"
    model, tokenizer = models.load(spec, layout="listed")
    text = tokenizer.encode((Path(__file__).parents[2] / "LICENSE").read_text())
    prompts = [np.array(text[40 * i :][: 10 + 2 * i], np.int32) for i in range(8)]
    alone = Ensemble(model)
    rows: list[dict[str, Any]] = []
    bars: list[_suite.Bar] = []
    with _torch(model, tokenizer, new, options) as peer:
        for batch in (1, 8):
            given = prompts[:batch]
            calls: dict[str, Callable[[], Any]] = {
                "logitjax": lambda g=given: generate(alone, g, max_new_tokens=new)
            }
            if peer is not None:
                calls["transformers + torch"] = lambda g=given: peer(g)
            seconds = timing.paired_seconds(calls, repeats=options.repeats)
            for name, times in seconds.items():
                ratio = timing.paired_ratio(seconds["logitjax"], times)
                rows.append(_row(name, batch, new, times) | {"ours / its seconds": ratio})
            if peer is not None:
                ours, theirs = seconds["logitjax"], seconds["transformers + torch"]
                bars.append(
                    _suite.Bar(
                        name=f"tokens/s over torch's, B = {batch}",
                        value=timing.paired_ratio(theirs, ours),
                        limit=_BARS[batch],
                        sense=">=",
                    )
                )
    rows += _fused_rows(model, prompts, new, options)
    return _suite.Result(rows=rows, bars=bars)


def _row(name: str, batch: int, new: int, seconds: list[float]) -> dict[str, Any]:
    median = float(np.median(seconds))
    return {
        "what": name,
        "B": batch,
        "ms a step": 1e3 * median / new,
        "tokens/s": batch * new / median,
    }


def _fused_rows(
    model: models.Decoder, prompts: list[np.ndarray], new: int, options: _suite.Options
) -> list[dict[str, Any]]:
    layers = model.config.num_layers
    small = [
        models.keep_layers(model, sorted({i, layers // 2, layers - 1, *range(min(2, layers))}))
        for i in range(min(3, layers))
    ]
    experts, base = small[:-1], small[-1:]
    batches = (1,) if options.smoke else (1, 8)
    rows = []
    for batch in batches:
        line_ups = {
            "large alone": Ensemble(model),
            "proxy": Ensemble(model, experts=experts, bases=base, fuse=fusion.ProxyTuning()),
            "dynamic": Ensemble(model, experts=experts, bases=base, fuse=fusion.DynamicFusion()),
            "dynamic, not stacked": Ensemble(
                model, experts=experts, bases=base, fuse=fusion.DynamicFusion(), stack=False
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
            rows.append(
                _row(name, batch, new, times) | {"models": count, "over large alone": ratio}
            )
    return rows


@contextlib.contextmanager
def _torch(
    model: models.Decoder, tokenizer: models.Tokenizer, new: int, options: _suite.Options
) -> Iterator[Callable[[list[np.ndarray]], Any] | None]:
    """A call that lets transformers generate, or None where there is no such interpreter."""
    python = os.environ.get("LOGITJAX_TORCH_PYTHON")
    if not python or options.smoke:
        yield None
        return
    script = Path(__file__).with_name("_decoding_torch.py")
    with tempfile.TemporaryDirectory() as directory:
        models.save_pretrained(model, tokenizer, directory)
        command = [python, os.fspath(script), directory, str(os.cpu_count()), str(new)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        send, receive = process.stdin, process.stdout
        if receive.readline().strip() != "ready":
            print(f"torch: {python} did not start")
            yield None
            return

        def call(prompts: list[np.ndarray]) -> Any:
            send.write(json.dumps([p.tolist() for p in prompts]) + "\n")
            send.flush()
            return json.loads(receive.readline())["tokens"]

        try:
            yield call
        finally:
            send.close()
            process.wait(timeout=60)
