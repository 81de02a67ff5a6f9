"""Generation of whole batches, from prompts to the end."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from logitjax.decoding._chunks import Generated, generated, in_chunks, joined, one_step, with_texts
from logitjax.decoding._draft_control import DraftControl
from logitjax.decoding._engine import Engine
from logitjax.decoding._ensemble import Ensemble, Plan
from logitjax.decoding._requests import Prompt, Request, bucket, fresh_rows, left_padded
from logitjax.decoding._sampling import GREEDY, Sampling
from logitjax.decoding._step import DecodeOptions, constrain, each_leaf, run_steps, start
from logitjax.decoding._text import TextOptions

# Number of chunks at once while drafting does not pay.
_STRETCH = 4


@functools.partial(
    jax.jit, static_argnames=("plan", "options", "steps"), donate_argnames=("state",)
)
def _generate(plan: Plan, options: DecodeOptions, params, state, tokens, positions, steps: int):
    state = constrain(plan, options, state)
    state, first = start(plan, options, params, state, tokens, positions)
    # `start` chose the first token.
    state, rest = run_steps(plan, options, params, state, steps - 1)
    return state, joined([one_step(first), rest])


def as_prompts(prompts: Any) -> list[np.ndarray]:
    """One array of ids per row, from one prompt or several."""
    # One prompt, given as ids.
    if len(prompts) and np.ndim(prompts[0]) == 0:
        return [np.asarray(prompts)]
    return [np.asarray(row) for row in prompts]


def generate(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    others: Sequence[Sequence[Prompt] | None] | None = None,
    stop_ids: Sequence[int] = (),
    logit_bias: dict[int, float] | None = None,
    text: TextOptions | None = None,
    drafts: DraftControl | None = None,
    options: DecodeOptions | None = None,
) -> Generated:
    """Continue prompts of any lengths, all rows together, in one compiled loop.

    ``drafts`` make it faster if a small model, or an earlier part of the text, often guesses the
    next tokens. It drafts some, one pass verifies them, and each row advances as far as its draft
    is accepted. Acceptance uses the (fused) distribution, so tokens follow it exactly, and greedy
    ones are the same as without drafts. Where drafting does not pay, rows decode step by step.

    Args:
        model: a `Decoder`, a `CachedModel`, ``(apply_fn, params, cache)`` or an `Ensemble`. A
            stacked decoder is converted on every call: pass a listed one to decode often.
        prompts: token ids, one prompt or several.
        sampling: for all rows (row i draws with ``seed + i``) or one per row.
        others: prompts of the experts, then of the bases, each with one per row; None: the same.
        stop_ids: rows end after any of these; the token itself is kept.
        logit_bias: added to the logits of these tokens, in every row.
        text: requests text, stop strings, and a function that receives tokens as they arrive.
        drafts: the drafter and the lengths. A control's estimates serve later calls of the same
            kind.
        options: further output; room for penalties, biases and stop tokens is added as needed.

    Raises:
        ValueError: for empty prompts, arguments that do not fit together, or no drafting member.

    >>> from logitjax.models import load_model
    >>> model = load_model("tiny")
    >>> out = generate(model, [[1, 2, 3], [4]], max_new_tokens=4, sampling=Sampling(temperature=1))
    >>> out.tokens.shape, out.lengths.tolist()
    ((2, 4), [4, 4])

    References:
        Drafts: Leviathan et al., 2023 (arXiv 2211.17192).
    """
    text = TextOptions() if text is None else text
    ensemble = model if isinstance(model, Ensemble) else Ensemble(model)
    requests = as_requests(
        as_prompts(prompts), sampling, others, max_new_tokens, stop_ids, logit_bias
    )
    options = with_room(DecodeOptions() if options is None else options, requests)
    plan = ensemble.plan
    rows = [request.streams(plan) for request in requests]
    # Lengths of all models: their prompts may differ, the new tokens are common.
    longest = max(len(p) for row in rows for p in row) + max_new_tokens
    if drafts is not None:
        most = max(drafts.lengths)
        engine = Engine(
            ensemble,
            slots=len(rows),
            # The engine adds `most`: a bucket again.
            max_length=bucket(longest + most) - most,
            options=options,
            drafts=drafts,
        )
        assert engine.rounds is not None
        # Each look of the host takes time.
        stretch = 1 if text.watched else _STRETCH
        advance = functools.partial(engine.advance, text.chunk, stretch=stretch)
        out = in_chunks(engine, requests, advance, text)
        return replace(out, drafting=engine.rounds.drafting())
    # Few lengths, so few programs.
    slots = bucket(longest)
    if text.watched:
        engine = Engine(ensemble, slots=len(rows), max_length=slots, options=options)
        # Always the same number of steps, so one program: the budget freezes rows by itself.
        return in_chunks(engine, requests, lambda: engine.decode_chunk(text.chunk), text)
    state = fresh_rows(plan, options, requests, cache=plan.init_cache(len(rows), slots))
    # Rows end by their budgets, so a larger number of steps only costs columns.
    state, emitted = _generate(
        plan, options, ensemble.params, state, *left_padded(rows), steps=bucket(max_new_tokens)
    )
    emitted, cut = jax.tree.map(np.asarray, emitted), slice(max_new_tokens)
    emitted = each_leaf(lambda leaf: leaf[:, cut], lambda leaf: leaf[cut], emitted)
    return with_texts(generated(emitted, np.asarray(state.stopped)), requests, text)


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
            # Rows with one seed would draw the same noise.
            replace(sampling, seed=(sampling.seed + i) % 2**32)
            for i in range(len(prompts))
        ]
    if len(sampling) != len(prompts):
        raise ValueError(f"sampling: expected one a prompt ({len(prompts)}), got {len(sampling)}")
    for other in others or ():
        if other is not None and len(other) != len(prompts):
            raise ValueError(f"others: expected {len(prompts)} prompts a model, got {len(other)}")
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
    penalties = any(r.sampling.penalizes for r in requests)
    biases = max(len(r.logit_bias or ()) for r in requests)
    return replace(
        options,
        repetition=options.repetition or penalties,
        max_logit_bias=max(options.max_logit_bias, bucket(biases, 8) if biases else 0),
        max_stop_ids=max(options.max_stop_ids, *(len(r.stop_ids) for r in requests)),
    )
