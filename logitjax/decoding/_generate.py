"""Whole batches from prompt to end."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from logitjax.decoding._chunks import Generated, generated, in_chunks, joined, one_step
from logitjax.decoding._engine import Engine
from logitjax.decoding._ensemble import Ensemble, Plan
from logitjax.decoding._requests import Prompt, Request, bucket, fresh_rows, left_padded
from logitjax.decoding._sampling import GREEDY, Sampling
from logitjax.decoding._step import DecodeOptions, constrain, run_steps, start
from logitjax.models import Tokenizer
from logitjax.ops import Array


@functools.partial(
    jax.jit, static_argnames=("plan", "options", "steps"), donate_argnames=("state",)
)
def _generate(plan: Plan, options: DecodeOptions, params, state, tokens, positions, steps: int):
    state = constrain(plan, options, state)
    state, first = start(plan, options, params, state, tokens, positions)
    state, rest = run_steps(plan, options, params, state, steps - 1)
    return state, joined([one_step(first), rest])


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
    requests = as_requests(
        as_prompts(prompts, where), sampling, others, max_new_tokens, stop_ids, logit_bias
    )
    options = with_room(DecodeOptions() if options is None else options, requests)
    plan = ensemble.plan
    rows = [request.streams(plan) for request in requests]
    slots = bucket(max(len(p) for row in rows for p in row) + max_new_tokens)
    if stream is not None or stop_strings:
        engine = Engine(ensemble, slots=len(rows), max_length=slots, options=options)
        # Always the same number of steps, so one program: the budget freezes rows by itself.
        return in_chunks(
            engine,
            requests,
            lambda: engine.decode_chunk(chunk),
            tokenizer=tokenizer,
            stop_strings=stop_strings,
            stream=stream,
        )
    state = fresh_rows(plan, options, requests, cache=plan.init_cache(len(rows), slots))
    state, emitted = _generate(
        plan, options, ensemble.params, state, *left_padded(rows), steps=max_new_tokens
    )
    return generated(emitted, np.asarray(state.stopped), tokenizer)


def as_requests(
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


def with_room(options: DecodeOptions, requests: Sequence[Request]) -> DecodeOptions:
    penalties = any(r.sampling.repetition_penalty != 1 for r in requests)
    return replace(
        options,
        repetition=options.repetition or penalties,
        max_logit_bias=max(options.max_logit_bias, *(len(r.logit_bias or ()) for r in requests)),
        max_stop_ids=max(options.max_stop_ids, *(len(r.stop_ids) for r in requests)),
    )
