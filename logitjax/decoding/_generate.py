"""Whole batches from prompt to end."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.decoding._engine import Engine
from logitjax.decoding._ensemble import Ensemble, Plan
from logitjax.decoding._requests import Prompt, Request, bucket, fresh_rows, left_padded
from logitjax.decoding._sampling import GREEDY, Sampling
from logitjax.decoding._step import (
    DecodeOptions,
    Emitted,
    constrain,
    run_steps,
    start,
)
from logitjax.decoding._text import TextStream
from logitjax.models import Tokenizer
from logitjax.ops import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """What `generate` made, one row a prompt.

    Attributes:
      tokens: int32 ``[rows, new]``; after a row's end the pad token.
      lengths: int32 ``[rows]``, tokens before that, a stop token included.
      stopped: bool ``[rows]``: ended by a stop token or string rather than by the budget.
      logprobs: float32 ``[rows, new]`` of the tokens, None unless asked for.
      top_ids: int32 ``[rows, new, n]``, the most likely tokens.
      top_logprobs: float32 ``[rows, new, n]``, theirs.
      info: what the fusion said, leaves ``[new, ...]``.
      texts: one string a row where a tokenizer was given, cut before a stop string.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    info: Any = None
    texts: tuple[str, ...] | None = None

    def rows(self) -> list[list[int]]:
        """Each row's tokens without padding."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


@functools.partial(
    jax.jit, static_argnames=("plan", "options", "steps"), donate_argnames=("state",)
)
def _generate(plan: Plan, options: DecodeOptions, params, state, tokens, positions, steps: int):
    state = constrain(plan, options, state)
    state, first = start(plan, options, params, state, tokens, positions)
    state, rest = run_steps(plan, options, params, state, steps - 1)
    return state, joined([_one_step(first), rest])


def _one_step(emitted: Emitted) -> Emitted:
    wide = jax.tree.map(lambda leaf: leaf[:, None], replace(emitted, info=None))
    return replace(wide, info=jax.tree.map(lambda leaf: leaf[None], emitted.info))


def joined(parts: Sequence[Emitted]) -> Emitted:
    """Consecutive pieces of ``[rows, steps]`` as one."""

    def concatenate(axis: int) -> Callable[..., Any]:
        return lambda *leaves: jnp.concatenate(leaves, axis=axis)

    rows = jax.tree.map(concatenate(1), *[replace(p, info=None) for p in parts])
    info = jax.tree.map(concatenate(0), *[p.info for p in parts])
    return replace(rows, info=info)


def as_prompts(prompts: Any, where: Array | None = None) -> list[np.ndarray]:
    """One array of ids a row, of one prompt, several, or a padded array and what of it is there."""
    if where is not None:
        return [
            np.asarray(row)[np.asarray(kept, bool)]
            for row, kept in zip(prompts, where, strict=True)
        ]
    if len(prompts) and np.ndim(prompts[0]) == 0:
        return [np.asarray(prompts)]
    return [np.asarray(row) for row in prompts]


def generate(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    where: Array | None = None,
    others: Sequence[Sequence[Prompt] | None] | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    logit_bias: dict[int, float] | None = None,
    tokenizer: Tokenizer | None = None,
    stream: Callable[[int, list[int], str], None] | None = None,
    chunk: int = 8,
    options: DecodeOptions | None = None,
) -> Generated:
    """Continue prompts of any lengths, all rows together, in one compiled loop.

    Where somebody wants to see tokens as they come (``stream``, ``stop_strings``) the same steps
    run in chunks and the host looks in between; tokens are the same.

    Args:
      model: a `Decoder`, a `CachedModel`, ``(apply_fn, params, cache)`` or an `Ensemble`. A stacked
        decoder is converted on every call: hand in a listed one to decode often.
      prompts: token ids, one prompt or several, or an array with ``where``.
      max_new_tokens: how many to add at most.
      sampling: for all rows (row i draws with ``seed + i``) or one a row.
      where: bool, like ``prompts``, false at padding on either side.
      others: prompts of the experts, then of the bases, each a list with one a row; None: the same.
      stop_ids: rows end after any of these; the token itself is kept.
      stop_strings: rows end with the token that completes one; needs ``tokenizer``.
      logit_bias: added to the logits of these tokens, in every row.
      tokenizer: of the model, to make texts.
      stream: called with (row, new tokens, new text) after every chunk, the text ``''`` without
        a tokenizer.
      chunk: tokens between two looks of the host.
      options: what else to report; room for penalties, biases and stop tokens is made as needed.

    Returns:
      `Generated`.

    Raises:
      ValueError: for empty prompts, or arguments that do not fit together.

    >>> from flax import nnx
    >>> from logitjax.models import Decoder, DecoderConfig
    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = Decoder(config, rngs=nnx.Rngs(0), layout="listed")
    >>> out = generate(model, [[1, 2, 3], [4]], max_new_tokens=4, sampling=Sampling(temperature=1))
    >>> out.tokens.shape, out.lengths.tolist()
    ((2, 4), [4, 4])
    """
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings: a tokenizer is needed to see them")
    ensemble = model if isinstance(model, Ensemble) else Ensemble(model)
    requests = _requests(
        as_prompts(prompts, where), sampling, others, max_new_tokens, stop_ids, logit_bias
    )
    options = _with_room(DecodeOptions() if options is None else options, requests)
    plan = ensemble.plan
    rows = [request.streams(plan) for request in requests]
    slots = bucket(max(len(p) for row in rows for p in row) + max_new_tokens)
    if stream is not None or stop_strings:
        engine = Engine(ensemble, slots=len(rows), max_length=slots, options=options)
        return _in_chunks(engine, requests, tokenizer, stop_strings, stream, chunk)
    state = fresh_rows(plan, options, requests, cache=plan.init_cache(len(rows), slots))
    state, emitted = _generate(
        plan, options, ensemble.params, state, *left_padded(rows), steps=max_new_tokens
    )
    return _generated(emitted, np.asarray(state.stopped), tokenizer)


def _requests(
    prompts: Sequence[np.ndarray],
    sampling: Sampling | Sequence[Sampling],
    others: Sequence[Sequence[Prompt] | None] | None,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    logit_bias: dict[int, float] | None,
) -> list[Request]:
    if not len(prompts):
        raise ValueError("prompts: expected at least one")
    if isinstance(sampling, Sampling):
        sampling = [
            replace(sampling, seed=(sampling.seed + i) % 2**32) for i in range(len(prompts))
        ]
    if len(sampling) != len(prompts):
        raise ValueError(f"sampling: expected one a prompt ({len(prompts)}), got {len(sampling)}")
    for theirs in others or ():
        if theirs is not None and len(theirs) != len(prompts):
            raise ValueError(f"others: expected {len(prompts)} prompts a model, got {len(theirs)}")
    return [
        Request(
            prompt=prompt,
            others=None if others is None else [None if o is None else o[i] for o in others],
            max_new_tokens=max_new_tokens,
            sampling=sampling[i],
            stop_ids=tuple(stop_ids),
            logit_bias=logit_bias,
        )
        for i, prompt in enumerate(prompts)
    ]


def _with_room(options: DecodeOptions, requests: Sequence[Request]) -> DecodeOptions:
    penalties = any(r.sampling.repetition_penalty != 1 for r in requests)
    return replace(
        options,
        repetition=options.repetition or penalties,
        max_logit_bias=max(options.max_logit_bias, *(len(r.logit_bias or ()) for r in requests)),
        max_stop_ids=max(options.max_stop_ids, *(len(r.stop_ids) for r in requests)),
    )


def _in_chunks(
    engine: Engine,
    requests: Sequence[Request],
    tokenizer: Tokenizer | None,
    stop_strings: Sequence[str],
    stream: Callable[[int, list[int], str], None] | None,
    chunk: int,
) -> Generated:
    rows = [_Row(tokenizer, stop_strings) for _ in requests]
    steps = requests[0].max_new_tokens
    parts = [jax.tree.map(np.asarray, _one_step(engine.prefill_all(requests)))]
    while True:
        active = engine.active
        for i, row in enumerate(rows):
            new, text = row.take(parts[-1].tokens[i][parts[-1].valid[i]], last=not active[i])
            if stream is not None and (new or text):
                stream(i, new, text)
        done = sum(part.tokens.shape[1] for part in parts)
        cut = np.array([row.cut for row in rows])
        if done >= steps or not (active & ~cut).any():
            break
        engine.evict(np.flatnonzero(cut).tolist())
        # Always the same number: the budget freezes rows by itself.
        parts.append(jax.tree.map(np.asarray, engine.decode_chunk(chunk)))
    lengths = np.array([row.length for row in rows], np.int32)
    there = np.arange(steps) < lengths[:, None]

    def fit(leaf: np.ndarray, fill: int = 0) -> np.ndarray:
        """As many columns as were asked for, nothing behind a row's end."""
        wide = np.zeros((len(leaf), steps, *leaf.shape[2:]), leaf.dtype)
        wide[:, : leaf.shape[1]] = leaf[:, :steps]
        return np.where(there.reshape(*there.shape, *(1,) * (leaf.ndim - 2)), wide, fill)

    emitted = joined(parts)
    info = jax.tree.map(lambda leaf: np.asarray(leaf)[:steps], emitted.info)
    tokens = fit(np.asarray(emitted.tokens), engine.options.pad_id)
    emitted = jax.tree.map(lambda leaf: fit(np.asarray(leaf)), replace(emitted, info=None))
    emitted = replace(emitted, tokens=tokens, valid=there, info=info)
    stopped = np.asarray(engine.state.stopped) | cut
    texts = None if tokenizer is None else tuple(row.text for row in rows)
    return replace(_generated(emitted, stopped, None), texts=texts)


class _Row:
    """What the host keeps of a row between chunks."""

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str]):
        self._stream = None if tokenizer is None else TextStream(tokenizer, stop_strings)
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
            new = new[: len(self._stream.tokens) - self.length]
        self.length += len(new)
        return new, text


def _generated(emitted: Emitted, stopped: np.ndarray, tokenizer: Tokenizer | None) -> Generated:
    emitted = jax.tree.map(np.asarray, emitted)
    lengths = emitted.valid.sum(axis=1).astype(np.int32)
    texts = None
    if tokenizer is not None:
        texts = tuple(
            tokenizer.decode(row[:n].tolist(), skip_special=True)
            for row, n in zip(emitted.tokens, lengths, strict=True)
        )
    return Generated(
        tokens=emitted.tokens,
        lengths=lengths,
        stopped=stopped,
        logprobs=emitted.logprobs,
        top_ids=emitted.top_ids,
        top_logprobs=emitted.top_logprobs,
        info=emitted.info,
        texts=texts,
    )
