"""A model's weights in four types, and two other heads: bytes, tokens a CPU-second, differences.

    python -m experiments.benchmark weights

SmolLM2, greedy, one prompt of 16 tokens and 64 new ones. Speed is tokens a second of processor
time, so that other programs of the machine matter less; types take turns. *KL* is from the float32
model to each, in nats a token, on 512 tokens of prose. *Same text* is the share of float32's greedy
tokens, 200 after each of 50 prompts, that a head gives too; *all rows* the share of them at which
its certificate fails, so that it reads all rows. Heads are fitted to 10,000 tokens of summaries.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.shared import suite
from logitjax import data, decoding, models, vq
from logitjax.ops import Codes, log_softmax

_TYPES = ("float32", "bfloat16", "int8", "int4")
_HEADS: tuple[Any, ...] = ("screened", "certified")


def run(options: suite.Options) -> suite.Result:
    spec, new = ("tiny", 4) if options.smoke else ("smollm2", 64)
    tokenizer = models.load_tokenizer(spec)
    text = tokenizer.encode((Path(__file__).parents[2] / "LICENSE").read_text())
    prompt = np.array(text[:16], np.int32)
    prose = np.array(text[200 : 200 + (16 if options.smoke else 512)], np.int32)
    rows: dict[str, dict[str, Any]] = {}
    ensembles: dict[str, decoding.Ensemble] = {}
    wide: Any = None
    made = {name: _in_type(spec, name) for name in _TYPES}
    converted, prompts = _converted(made["float32"], tokenizer, options)
    for name, model in (made | converted).items():
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
    exact = _text(ensembles["float32"], prompts, options)
    for name in _HEADS:
        text = _text(ensembles[name], prompts, options)
        rows[name] |= {"tokens": text.size, "same text": float((text == exact).mean())}
    read = np.concatenate([prompts, exact], axis=1)
    rows["certified"]["all rows"] = 1 - _certified(converted["certified"], read)[:, 15:-1].mean()
    spent: dict[str, list[float]] = {name: [] for name in ensembles}
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
        suite.at_least("same text of the certified head", rows["certified"]["same text"], 1),
    ]
    return suite.Result(rows=list(rows.values()), bars=[] if options.smoke else bars)


def _in_type(spec: str, name: str) -> models.Decoder:
    dtype = name if name == "bfloat16" else "float32"
    model, _ = models.load(spec, dtype=dtype, param_dtype=dtype, layout="listed")
    return models.quantize(model, name) if name.startswith("int") else model


def _log_probs(model: models.Decoder, tokens: np.ndarray) -> np.ndarray:
    logits = nnx.jit(lambda model, ids: log_softmax(model(ids)[0]))(model, tokens[None])
    return np.asarray(logits, np.float64)


def _converted(
    model: models.Decoder, tokenizer: models.Tokenizer, options: suite.Options
) -> tuple[dict[str, models.Decoder], np.ndarray]:
    """The model with other heads, and prompts of 16 tokens that they were not fitted to."""
    count, few, size = (2, 16, 64) if options.smoke else (50, 512, 10_000)
    text = f"text:{Path(__file__).parents[2] / 'LICENSE'}"
    source = text if options.smoke else "tfds:wiki_summaries"
    heads = {}
    with tempfile.TemporaryDirectory() as root:
        texts = data.pack_splits(source, {"": tokenizer}, seq_len=64, directory=f"{root}/data")
        train, test = texts.splits["train"], texts.splits["test"]
        for kind in _HEADS:
            batches = (train.batch(i, seed=0, batch_size=2)[""] for i in range(len(train) // 2))
            config = vq.ConvertConfig(kind=kind, candidates=few, steps=0, max_tokens=size)
            heads[kind] = config.convert(model, batches, root).model
        return heads, test.batch(0, seed=0, batch_size=count)[""]["tokens"][:, :16]


def _text(ensemble: decoding.Ensemble, prompts: np.ndarray, options: suite.Options) -> np.ndarray:
    return decoding.generate(ensemble, prompts, max_new_tokens=4 if options.smoke else 200).tokens


def _certified(model: models.Decoder, tokens: np.ndarray) -> np.ndarray:
    @nnx.jit
    def certified(model: models.Decoder, tokens: jax.Array) -> jax.Array:
        hidden, _ = model.hidden_states(tokens)
        return model.head.certified(hidden, 1, model.embedding[...])

    return np.concatenate([np.asarray(certified(model, row[None])) for row in tokens])
