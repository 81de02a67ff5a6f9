"""A model's weights in four types: bytes, tokens a CPU-second, and the effect of rounding.

    python -m experiments.benchmark weights

SmolLM2, greedy, one prompt of 16 tokens and 64 new ones. Speed is tokens a second of processor
time, so that other programs of the machine matter less; types take turns. *KL* is from the float32
model to each, in nats a token, on 512 tokens of prose.
"""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.shared import suite
from logitjax import decoding, models
from logitjax.ops import Codes, log_softmax

_NAMES = ("float32", "bfloat16", "int8", "int4")


def run(options: suite.Options) -> suite.Result:
    spec, new = ("tiny", 4) if options.smoke else ("smollm2", 64)
    tokenizer = models.load_tokenizer(spec)
    text = tokenizer.encode((Path(__file__).parents[2] / "LICENSE").read_text())
    prompt = np.array(text[:16], np.int32)
    prose = np.array(text[200 : 200 + (16 if options.smoke else 512)], np.int32)
    rows: dict[str, dict[str, Any]] = {}
    ensembles: dict[str, decoding.Ensemble] = {}
    wide: Any = None
    for name in _NAMES:
        model = _in_type(spec, name)
        log_p = _log_probs(model, prose)
        wide = log_p if name == "float32" else wide
        state = nnx.to_pure_dict(nnx.state(model))
        # Two numbers of four bits share a byte, as `Codes` counts them.
        stored = sum(
            x.nbytes for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Codes))
        )
        kl = float((np.exp(wide) * (wide - log_p)).sum(-1).mean())
        agree = float((wide.argmax(-1) == log_p.argmax(-1)).mean())
        rows[name] = {"weights": name, "MB": stored / 1e6, "KL": kl, "same first token": agree}
        ensembles[name] = decoding.Ensemble(model)
    spent: dict[str, list[float]] = {name: [] for name in _NAMES}
    for turn in range(1 + options.repeats):
        for name, ensemble in ensembles.items():
            start = time.process_time()
            decoding.generate(ensemble, [prompt], max_new_tokens=new)
            # The first call compiles.
            spent[name] += [time.process_time() - start] if turn else []
    for name, row in rows.items():
        row["tokens / CPU-s"] = new / float(np.median(spent[name]))
        row["over float32"] = float(np.median(np.divide(spent["float32"], spent[name])))
    share = rows["int8"]["MB"] / rows["float32"]["MB"]
    bars = [
        suite.at_least("speed of bfloat16 over float32", rows["bfloat16"]["over float32"], 0.8),
        suite.at_least("speed of int8 over float32", rows["int8"]["over float32"], 1.5),
        suite.at_most("bytes of int8 over float32", share, 0.3),
        suite.at_most("KL of int8", rows["int8"]["KL"], 1e-3),
    ]
    return suite.Result(rows=list(rows.values()), bars=[] if options.smoke else bars)


def _in_type(spec: str, name: str) -> models.Decoder:
    dtype = name if name == "bfloat16" else "float32"
    model, _ = models.load(spec, dtype=dtype, param_dtype=dtype, layout="listed")
    return models.quantize(model, name) if name.startswith("int") else model


def _log_probs(model: models.Decoder, tokens: np.ndarray) -> np.ndarray:
    logits = nnx.jit(lambda model, ids: log_softmax(model(ids)[0]))(model, tokens[None])
    return np.asarray(logits, np.float64)
