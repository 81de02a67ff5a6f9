"""Log-likelihoods of given continuations."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from logitjax.decoding._ensemble import Ensemble, Plan
from logitjax.decoding._generate import as_prompts, as_requests
from logitjax.decoding._requests import Prompt, bucket, left_padded
from logitjax.decoding._sampling import GREEDY
from logitjax.ops import log_softmax


def next_token_program(graphdef: Any) -> Any:
    """Compiled, without a cache: `(state, tokens [rows, length])` to next-token logits, float32."""

    @jax.jit
    def last(state: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        hidden, _ = model.hidden_states(tokens)
        return model.logits(hidden[:, -1:])[:, 0].astype(jnp.float32)

    return last


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of given tokens, one row per continuation.

    Attributes:
        logprobs: float32 ``[rows, time]``, 0 after the end of a continuation.
        greedy: bool ``[rows, time]``: the token is the most likely one.
        where: bool ``[rows, time]``: the position is part of the continuation.
    """

    logprobs: np.ndarray
    greedy: np.ndarray
    where: np.ndarray


@functools.partial(jax.jit, static_argnames="plan")
def _score(plan: Plan, params, cache, prompt, tokens, positions, targets):
    """``prompt``: tokens and positions ``[S, B, T]``; the rest in blocks ``[n, S, B, t]``."""
    _, cache = plan.forward(params, prompt[0], prompt[1], cache, last_only=True)

    def block(cache: Any, inputs: Any) -> tuple[Any, Any]:
        tokens, positions, targets = inputs
        logits, cache = plan.forward(params, tokens, positions, cache)
        fused, _ = plan.combine(logits)
        log_p = jnp.take_along_axis(log_softmax(fused), targets[..., None], axis=-1)[..., 0]
        return cache, (log_p, fused.argmax(axis=-1) == targets)

    return lax.scan(block, cache, (tokens, positions, targets))[1]


def score(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    continuations: Prompt | Sequence[Prompt],
    *,
    others: Sequence[Sequence[Prompt] | None] | None = None,
    block: int = 64,
) -> Scores:
    """Log-probabilities of continuations, each after its prompt, by a model or ensemble.

    Continuations are read in blocks, so that logits of at most ``block`` positions are held at
    once. The models of an `Ensemble` read their own prompts and then the same continuation.

    Args:
        model, others: as for `generate`.
        prompts: token ids, at least one each.
        continuations: token ids, one array per prompt.

    Raises:
        ValueError: for empty prompts or continuations, or unequal numbers of them.

    >>> from logitjax.models import load_model
    >>> score(load_model("tiny"), [[1, 2, 3], [4]], [[5, 6], [7]]).where
    array([[ True,  True],
           [ True, False]])
    """
    ensemble = model if isinstance(model, Ensemble) else Ensemble(model)
    plan = ensemble.plan
    rows = as_prompts(prompts)
    ends = [np.asarray(row, np.int32) for row in as_prompts(continuations)]
    if len(rows) != len(ends) or not rows:
        raise ValueError(f"continuations: expected {len(rows)}, got {len(ends)}")
    if not all(map(len, ends)):
        raise ValueError("continuations: expected at least one token each")
    requests = as_requests(rows, GREEDY, others, 1, (), None)
    streams = [request.streams(plan) for request in requests]
    longest = max(map(len, ends))
    # Few shapes, so that calls of similar length share a program.
    block = min(block, bucket(longest))
    time = -(-longest // block) * block
    # A continuation's first token is predicted from the prompt's last, which each model reads in
    # its own prompt; the rest of the prompts comes before.
    before = left_padded([[prompt[:-1] for prompt in row] for row in streams])
    tokens = np.zeros((plan.streams, len(rows), time), np.int32)
    positions = np.full_like(tokens, -1)
    targets = np.zeros((len(rows), time), np.int32)
    for i, (row, end) in enumerate(zip(streams, ends, strict=True)):
        targets[i, : len(end)] = end
        for s, (prompt, read) in enumerate(zip(row, plan.read(end[:-1]), strict=True)):
            tokens[s, i, : len(end)] = [prompt[-1], *read]
            positions[s, i, : len(end)] = len(prompt) - 1 + np.arange(len(end))
    where = np.arange(longest) < np.array([len(end) for end in ends])[:, None]

    def blocks(array: np.ndarray) -> np.ndarray:
        split = array.reshape(*array.shape[:-1], time // block, block)
        # `[blocks, ..., block]`.
        return np.moveaxis(split, -2, 0)

    log_p, greedy = _score(
        plan,
        ensemble.params,
        plan.init_cache(len(rows), bucket(before[0].shape[-1] + time)),
        before,
        *map(blocks, (tokens, positions, targets)),
    )

    def whole(leaf: jax.Array) -> np.ndarray:
        # Blocks side by side again.
        parts = np.moveaxis(np.asarray(leaf), 0, -2)
        return parts.reshape(*parts.shape[:-2], time)[..., :longest]

    scores = np.where(where, whole(log_p), 0)
    return Scores(logprobs=scores, greedy=whole(greedy) & where, where=where)


def nll_from_model(model: Any) -> Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]:
    """A function for the negative log-likelihood of given tokens under a model or ensemble.

    Tokens before a row's first target are read through the cache, without logits. Therefore many
    short answers to long questions cost little more than the questions. ::

        nll[b, t] = -log p(tokens[b, t] | tokens[b, :t])   where targets[b, t], else 0

    Returns:
        ``nll_fn(tokens, targets)`` of int32 and bool ``[batch, time]``, giving float32 ``[batch,
        time]`` and whether each target was the most likely token, bool ``[batch, time]``: what
        `logitjax.evaluation.score_rows` takes. A row's first token must not be a target.

    >>> from logitjax.models import load_model
    >>> nll_fn, targets = nll_from_model(load_model("tiny")), np.array([[0, 1, 1], [0, 1, 0]], bool)
    >>> nll, greedy = nll_fn([[1, 2, 3], [4, 7, 0]], targets)
    >>> (nll > 0).tolist()
    [[False, True, True], [False, True, False]]
    """
    ensemble = model if isinstance(model, Ensemble) else Ensemble(model)

    def nll_fn(tokens: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
        tokens, targets = np.asarray(tokens, np.int32), np.asarray(targets, bool)
        if tokens.ndim != 2 or tokens.shape != targets.shape or targets[:, :1].any():
            raise ValueError(
                "tokens and targets: expected [batch, time], no target in the first column, got "
                f"{tokens.shape} and {targets.shape}"
            )
        nll, greedy = np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, bool)
        spans = []
        for row in targets:
            places = np.flatnonzero(row)
            # A row without targets is padded to the shortest length: batches keep their size.
            spans.append((places[0], places[-1] + 1) if len(places) else (1, 2))
        scores = score(
            ensemble,
            [row[:start] for row, (start, _) in zip(tokens, spans, strict=True)],
            [row[start:end] for row, (start, end) in zip(tokens, spans, strict=True)],
        )
        for i, (start, end) in enumerate(spans):
            nll[i, start:end] = -scores.logprobs[i, : end - start]
            greedy[i, start:end] = scores.greedy[i, : end - start]
        return np.where(targets, nll, 0), greedy & targets

    return nll_fn
