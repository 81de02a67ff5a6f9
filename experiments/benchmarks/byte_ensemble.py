"""Two models of other tokenizers together, byte by byte, beside the better of them.

    LOGITJAX_OTHER_MODEL=gemma-3-270m.gguf python -m experiments.benchmark byte_ensemble

Bits a byte of Wikipedia summaries under SmolLM2, under the other model, and under the mixture of
their probabilities of the next byte, whose weight is the best on other summaries. Each of five
seeds draws its own summaries, to tune and to test; the better single model is the better one on
the summaries to tune. Token paths below 1e-4 of all are dropped: that moves a text by some 2e-5
bits a byte. Without another model, SmolLM2 is mixed with a cut of its layers.
"""

import os
from typing import Any

import numpy as np
import scipy.stats
from absl import logging

from experiments.shared import suite
from logitjax import data, decoding, models

_SEEDS, _TUNE, _TEST = 5, 4, 8
# Bytes of a summary that are only read, and that are scored.
_READ, _SCORED = 160, 64
_WEIGHTS = np.linspace(0, 1, 41)


def run(options: suite.Options) -> suite.Result:
    smoke, other = options.smoke, os.environ.get("LOGITJAX_OTHER_MODEL")
    first = models.load("tiny" if smoke else "smollm2", layout="listed")
    if other is None:
        layers = [0] if smoke else [0, 1, 2, 3, 4, 14, 26, 27, 28, 29]
        second = (models.keep_layers(first[0], layers), first[1])
    else:
        second = models.load(other, layout="listed")
    readers = [decoding.ByteEnsemble(pair, most=8, least=1e-4) for pair in (first, second)]
    source = "text:LICENSE" if smoke else "tfds:wiki_summaries"
    encoded = (example["text"].encode() for example in data.load_examples(source))
    texts = [text for text in encoded if len(text) >= _READ + _SCORED]
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(1 if smoke else _SEEDS):
        chosen = rng.permutation(len(texts))[: 2 if smoke else _TUNE + _TEST]
        bits = np.stack([_scores(readers, texts[i], 8 if smoke else _SCORED) for i in chosen])
        tune, test = np.split(bits, [1 if smoke else _TUNE])
        weight = float(_WEIGHTS[np.argmin([_mixed(tune, w).mean() for w in _WEIGHTS])])
        single = test[:, int(tune.mean((0, 2)).argmin())]
        rows.append(
            {
                "seed": seed,
                "SmolLM2": float(test[:, 0].mean()),
                "other": float(test[:, 1].mean()),
                "weight": weight,
                "together": float(_mixed(test, weight).mean()),
                "gain": float(single.mean() - _mixed(test, weight).mean()),
                "gain of the plain mean": float(single.mean() - _mixed(test, 0.5).mean()),
                "texts that gain": int((single.mean(1) > _mixed(test, weight).mean(1)).sum()),
            }
        )
        logging.info("%s", rows[-1])
    if smoke:
        return suite.Result(rows=rows)
    gains = [row["gain"] for row in rows]
    low = scipy.stats.t.interval(0.95, len(gains) - 1, np.mean(gains), scipy.stats.sem(gains))[0]
    rows.append({"seed": "mean", "gain": float(np.mean(gains)), "lower end, 95 %": float(low)})
    return suite.Result(
        rows=rows, bars=[suite.at_least("bits a byte gained, lower end", float(low), 0.0)]
    )


def _scores(readers: Any, text: bytes, count: int) -> np.ndarray:
    """Bits of each byte under each model, `[models, count]`."""
    out = np.zeros((len(readers), count))
    # Not within a character.
    start = next(n for n in range(_READ, 0, -1) if text[n] & 0xC0 != 0x80)
    for row, reader in zip(out, readers, strict=True):
        reader.begin(text[:start].decode())
        row[:] = [-reader.feed(text[n : n + 1]) / np.log(2) for n in range(start, start + count)]
    return out


def _mixed(bits: np.ndarray, weight: float) -> np.ndarray:
    """Bits `[texts, count]` under the mixture, of `[texts, models, count]`."""
    with np.errstate(divide="ignore"):
        return -np.log2((1 - weight) * 2 ** -bits[:, 0] + weight * 2 ** -bits[:, 1])
