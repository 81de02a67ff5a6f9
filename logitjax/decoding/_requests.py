"""Contents of a slot: prompts as padded arrays, and each row's own settings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from logitjax.decoding._ensemble import Plan
from logitjax.decoding._sampling import GREEDY, Sampling, sampling_rows
from logitjax.decoding._step import DecodeOptions, DecodeState
from logitjax.ops import checks

Prompt = Sequence[int] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and the settings for continuing it.

    Attributes:
        prompt: token ids, at least one.
        others: prompts of the experts, then of the bases; None (for one or all): the same.
        max_new_tokens: the row freezes after this many tokens.
        min_new_tokens: no stop token is drawn among this many first tokens.
        stop_ids: the row freezes after any of these, which is still emitted.
        logit_bias: numbers added to the logits of these tokens.
        allowed: which tokens may come first, as a row of `Engine.allow`; None for all.
        logprobs: whether log-probabilities are wanted; the engine may report zeros otherwise.
        extra: the slot's value of ``state.extra`` for the engine's processors.
    """

    prompt: Prompt
    others: Sequence[Prompt | None] | None = None
    max_new_tokens: int
    min_new_tokens: int = 0
    sampling: Sampling = GREEDY
    stop_ids: Sequence[int] = ()
    logit_bias: Mapping[int, float] | None = None
    allowed: np.ndarray | None = None
    logprobs: bool = True
    extra: Any = None

    def streams(self, plan: Plan) -> list[np.ndarray]:
        """One prompt for each model.

        Raises:
            TypeError: for prompts that are not integers.
            ValueError: for empty prompts, a wrong number of them, or ids outside the vocabulary.
        """
        count = plan.streams - 1
        others = [None] * count if self.others is None else list(self.others)
        if len(others) != count:
            raise ValueError(f"others: expected {count} prompts, got {len(others)}")
        sizes = list(plan.vocab_sizes)
        # Several models read one stream.
        if len(sizes) != plan.streams:
            sizes = [plan.vocab_size] * plan.streams
        # With a token map, the small models only have ids that it maps.
        mapped = sizes[0] if plan.token_map is None else plan.token_map.large_size
        same = plan.read(_tokens(self.prompt, min(sizes[0], mapped), "prompt"))
        streams = zip(same, (None, *others), sizes, strict=True)
        return [
            _tokens(tokens, size, "prompt") if local is None else _tokens(local, size, "others")
            for tokens, local, size in streams
        ]


def _tokens(prompt: Prompt, vocab_size: int, name: str) -> np.ndarray:
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"{name}: expected at least one token, got shape {tokens.shape}")
    checks.ids(tokens, vocab_size, name)
    return tokens.astype(np.int32)


def bucket(length: int, smallest: int = 16) -> int:
    """The next power of two up to 128, then the next multiple of 128: few shapes to compile."""
    if length > 128:
        return -(-length // 128) * 128
    return max(smallest, 1 << (length - 1).bit_length())


def left_padded(rows: Sequence[Sequence[np.ndarray]], most: int = 2**31) -> tuple[Any, Any]:
    """``rows[row][stream]`` as int32 tokens and positions ``[streams, rows, time]``; -1 pads."""
    time = min(bucket(max(len(prompt) for row in rows for prompt in row)), most)
    tokens = np.zeros((len(rows[0]), len(rows), time), np.int32)
    positions = np.full_like(tokens, -1)
    for i, row in enumerate(rows):
        for stream, prompt in enumerate(row):
            tokens[stream, i, time - len(prompt) :] = prompt
            positions[stream, i, time - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


def fresh_rows(
    plan: Plan,
    options: DecodeOptions,
    requests: Sequence[Request],
    *,
    cache: Any,
    extra: Any = None,
    room: int = 0,
) -> DecodeState:
    """The state of rows that have not read their prompts, with an empty ``cache`` of these rows.

    With ``room`` for this many tokens the state stores the text.
    """
    count = len(requests)
    for request in requests:
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {request.max_new_tokens}")
        if request.sampling.penalizes and not options.repetition:
            raise ValueError("sampling: its penalties need options with repetition=True")
        if (request.allowed is not None or request.min_new_tokens) and not options.masks:
            raise ValueError("allowed, min_new_tokens: they need options with masks=True")
    stop_ids = _table([list(r.stop_ids) for r in requests], options.max_stop_ids, -1, "stop_ids")
    biases = [dict(r.logit_bias or {}) for r in requests]
    width = options.max_logit_bias
    # An id outside the vocabulary would be dropped when biases are added.
    bias_ids = _table([list(b) for b in biases], width, plan.vocab_size, "logit_bias")
    values = _table([list(b.values()) for b in biases], width, 0, "logit_bias", np.float32)
    wrong = [i for b in biases for i in b if not 0 <= i < plan.vocab_size]
    if wrong:
        raise ValueError(f"logit_bias: token {wrong[0]} is not in the vocabulary")
    extras = [extra if r.extra is None else r.extra for r in requests]
    text = np.zeros((count, room), np.int32)
    for row, request in zip(text, requests, strict=True) if room else ():
        row[: len(request.prompt)] = request.prompt
    return DecodeState(
        cache=cache,
        lengths=np.zeros((plan.streams, count), np.int32),
        token=np.zeros(count, np.int32),
        active=np.ones(count, bool),
        stopped=np.zeros(count, bool),
        left=np.array([r.max_new_tokens for r in requests], np.int32),
        count=np.zeros(count, np.int32),
        least=np.array([r.min_new_tokens for r in requests], np.int32),
        sampling=sampling_rows([r.sampling for r in requests]),
        reports=np.array([r.logprobs for r in requests]),
        stop_ids=stop_ids,
        bias_ids=bias_ids,
        bias_values=values,
        seen=np.zeros((count, plan.vocab_size), bool) if options.repetition else None,
        counts=np.zeros((count, plan.vocab_size), np.int32) if options.repetition else None,
        allowed=_allowed(plan, requests) if options.masks else None,
        extra=jax.tree.map(lambda *leaves: np.stack(leaves), *extras),
        text=text if room else None,
    )


def _allowed(plan: Plan, requests: Sequence[Request]) -> np.ndarray:
    # All bits set: any token.
    words = np.full((len(requests), -(-plan.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    for row, request in zip(words, requests, strict=True):
        if request.allowed is not None:
            mask = np.asarray(request.allowed, np.uint32)
            if mask.shape != row.shape:
                raise ValueError(f"allowed: expected {row.shape} words, got {mask.shape}")
            row[:] = mask
    return words


def _table(
    rows: Sequence[Sequence[Any]], width: int, fill: int, name: str, dtype: Any = np.int32
) -> np.ndarray:
    longest = max(map(len, rows))
    if longest > width:
        raise ValueError(f"{name}: {longest} entries, but options leave room for {width}")
    table = np.full((len(rows), width), fill, dtype)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
