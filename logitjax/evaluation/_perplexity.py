"""Perplexity of running text."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from logitjax.data import TokenizerLike
from logitjax.evaluation._nll import NllFn
from logitjax.evaluation._rows import score_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPerplexity:
    """How well a model predicts text.

    Attributes:
      nll: nats a token.
      perplexity: ``exp(nll)``; depends on the tokenizer.
      bits_per_byte: of UTF-8; does not, up to the text lost at starts of windows.
      tokens: that were predicted.
    """

    nll: float
    perplexity: float
    bits_per_byte: float
    tokens: int


def text_perplexity(
    nll_fn: NllFn,
    tokenizer: TokenizerLike,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    batch_size: int = 8,
) -> TextPerplexity:
    """Perplexity of texts, each cut into windows that know nothing of each other.

    ::

        exp( sum nll / sum tokens ),   every token but the first of each window

    Args:
      nll_fn: see `nll_from_apply`.
      tokenizer: of the model; its beginning mark starts every window where it says ``add_bos``.
      texts: e.g. summaries from an encyclopedia, of which unlearning should change nothing.
      max_length: tokens of a window.
      batch_size: windows at a time.

    Returns:
      `TextPerplexity`.

    Raises:
      ValueError: windows of fewer than 2 tokens, or no text of 2 tokens.

    >>> from logitjax.evaluation import nll_from_apply
    >>> class Bytes:
    ...     vocab_size, bos_id, eos_id, pad_id, fingerprint = 256, None, None, 0, "bytes"
    ...     def encode(self, text, add_bos=False): return list(text.encode())
    ...     def decode(self, ids): return bytes(ids).decode()
    >>> uniform = nll_from_apply(lambda tokens: np.zeros((*tokens.shape, 256), np.float32))
    >>> found = text_perplexity(uniform, Bytes(), ["Some text."])
    >>> round(found.perplexity, 2), found.tokens
    (256.0, 9)
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    bos = [tokenizer.bos_id] if getattr(tokenizer, "add_bos", False) else []
    bos = [mark for mark in bos if mark is not None]
    rows, size = [], 0
    for text in texts:
        ids = tokenizer.encode(text)
        size += len(text.encode())
        step = max_length - len(bos)
        for start in range(0, len(ids), step):
            window = np.asarray(bos + ids[start : start + step], np.int32)
            if len(window) > 1:
                rows.append((window, np.arange(len(window)) > 0))
    if not rows:
        raise ValueError("texts: none has two tokens")
    scores = score_rows(nll_fn, rows, batch_size=batch_size, pad_id=tokenizer.pad_id or 0)
    total, tokens = float(scores.totals().sum()), int(scores.counts().sum())
    nll = total / tokens
    return TextPerplexity(
        nll=nll,
        perplexity=math.exp(min(nll, 700.0)),
        bits_per_byte=total / math.log(2) / size,
        tokens=tokens,
    )
