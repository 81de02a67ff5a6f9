"""Decoding with a host that looks in between: streams, stop strings, uneven progress."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.decoding._drafting import Drafting
from logitjax.decoding._engine import Engine
from logitjax.decoding._requests import Prompt, Request
from logitjax.decoding._step import Emitted, each_leaf
from logitjax.decoding._text import TextOptions, TextStream, last_whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """The result of `generate`, one row per prompt.

    Attributes:
        tokens: int32 ``[rows, new]``; after a row's end the pad token.
        lengths: int32 ``[rows]``, number of tokens before that, including a stop token.
        stopped: bool ``[rows]``: ended by a stop token or string rather than by the budget.
        logprobs: float32 ``[rows, new]`` of the tokens, None unless requested.
        top_ids: int32 ``[rows, new, n]``, the most likely tokens.
        top_logprobs: float32 ``[rows, new, n]``, their log-probabilities.
        info: the fusion's info, leaves ``[new, ...]``.
        texts: one string per row if a tokenizer was given, cut before a stop string.
        drafting: counts and speed-up of drafts; None without drafts.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    info: Any = None
    texts: tuple[str, ...] | None = None
    drafting: Drafting | None = None

    def rows(self) -> list[list[int]]:
        """Each row's tokens without padding."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


def one_step(emitted: Emitted) -> Emitted:
    return each_leaf(lambda leaf: leaf[:, None], lambda leaf: leaf[None], emitted)


def joined(parts: Sequence[Emitted], concatenate: Callable = jnp.concatenate) -> Emitted:
    def along(axis: int) -> Callable[..., Any]:
        return lambda *leaves: concatenate(leaves, axis=axis)

    return each_leaf(along(1), along(0), *parts)


def in_chunks(
    engine: Engine, requests: Sequence[Request], advance: Callable[[], Emitted], text: TextOptions
) -> Generated:
    """Prefill all slots, then ``advance()`` by any number of tokens until every row has ended."""
    rows = [_Row(text, request.prompt) for request in requests]
    # On the host, because emitted tokens would otherwise stay on the device until the end.
    parts = [one_step(jax.tree.map(np.asarray, engine.prefill_all(requests)))]
    while True:
        active = engine.active
        for i, row in enumerate(rows):
            new, piece = row.take(parts[-1].tokens[i][parts[-1].valid[i]], last=not active[i])
            if text.stream is not None and (new or piece):
                text.stream(i, new, piece)
        # Only the host sees stop strings, so it has to end those rows.
        cut = np.array([row.cut for row in rows])
        if not (active & ~cut).any():
            break
        if (active & cut).any():
            engine.evict(np.flatnonzero(cut).tolist())
        parts.append(jax.tree.map(np.asarray, advance()))
    lengths = np.array([row.length for row in rows], np.int32)
    emitted = _without_gaps(parts, lengths, requests[0].max_new_tokens, engine.options.pad_id)
    stopped = np.asarray(engine.state.stopped) | cut
    texts = None if text.tokenizer is None else tuple(row.text for row in rows)
    return replace(generated(emitted, stopped), texts=texts)


def _without_gaps(
    parts: Sequence[Emitted], lengths: np.ndarray, steps: int, pad_id: int
) -> Emitted:
    """Each row's tokens without gaps, ``steps`` columns, padded after a row's end."""
    emitted = joined(parts, np.concatenate)

    def fit(leaf: np.ndarray, fill: int = 0) -> np.ndarray:
        wide = np.full((len(leaf), steps, *leaf.shape[2:]), fill, leaf.dtype)
        for row, values, present, length in zip(wide, leaf, emitted.valid, lengths, strict=True):
            row[:length] = values[present][:length]
        return wide

    def fit_info(leaf: np.ndarray) -> np.ndarray:
        if leaf.shape[-1:] != lengths.shape:
            return leaf[:steps]  # not by row
        return np.moveaxis(fit(np.moveaxis(leaf, -1, 0)), 0, -1)

    return replace(each_leaf(fit, fit_info, emitted), tokens=fit(emitted.tokens, pad_id))


class _Row:
    """The host's record of a row between chunks."""

    def __init__(self, text: TextOptions, prompt: Prompt):
        context = np.asarray(prompt).tolist() if text.continues else []
        self._stream = None
        if text.tokenizer is not None:
            self._stream = TextStream(
                text.tokenizer, text.stop_strings, context, stop_pattern=text.stop_pattern
            )
        self.length = 0

    @property
    def cut(self) -> bool:
        return self._stream is not None and self._stream.stopped

    @property
    def text(self) -> str:
        return "" if self._stream is None else self._stream.text

    def take(self, tokens: np.ndarray, *, last: bool) -> tuple[list[int], str]:
        """The new tokens up to a stop string, and the text that became certain."""
        if self.cut or not len(tokens):
            return [], ""
        new, text = tokens.tolist(), ""
        if self._stream is not None:
            text = self._stream.push(new)
            text += self._stream.finish() if last else ""
            # The stream takes no token after the one that completes a stop string.
            new = new[: len(self._stream.tokens) - self.length]
        self.length += len(new)
        return new, text


def with_texts(out: Generated, requests: Sequence[Request], text: TextOptions) -> Generated:
    tokenizer = text.tokenizer
    if tokenizer is None:
        return out
    texts = []
    for row, request in zip(out.rows(), requests, strict=True):
        prompt = np.asarray(request.prompt).tolist() if text.continues else []
        # Decoded with it and then cut: alone, a first word may lose the space before it.
        context = last_whole(tokenizer, prompt)
        before = tokenizer.decode(context, skip_special=True)
        texts.append(tokenizer.decode([*context, *row], skip_special=True)[len(before) :])
    return replace(out, texts=tuple(texts))


def generated(emitted: Emitted, stopped: np.ndarray) -> Generated:
    emitted = jax.tree.map(np.asarray, emitted)
    lengths = emitted.valid.sum(axis=1).astype(np.int32)
    return Generated(
        tokens=emitted.tokens,
        lengths=lengths,
        stopped=stopped,
        logprobs=emitted.logprobs,
        top_ids=emitted.top_ids,
        top_logprobs=emitted.top_logprobs,
        info=emitted.info,
    )
