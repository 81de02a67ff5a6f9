"""A head whose states pass an RMSNorm, as the measurements of the literature are made on."""

import numpy as np

from logitjax.leakage import LogitOracle


def head_and_states(vocab, width, count, *, seed=0, std=2.5, anisotropy=0.0):
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((count, width)) * np.exp(-anisotropy * np.arange(width) / width)
    states /= np.sqrt((states**2).mean(axis=1, keepdims=True))
    head = rng.standard_normal((vocab, width)) * std / np.sqrt(width)
    return head, states


def oracle_of(logits, policy, **options):
    """A prompt is the number of a row."""
    table = np.asarray(logits, np.float32)
    return LogitOracle(lambda tokens: table[np.asarray(tokens)[:, -1]], policy, **options)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
