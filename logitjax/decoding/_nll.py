"""A model as the function that `logitjax.evaluation` asks for negative log-likelihoods."""

from collections.abc import Callable
from typing import Any

import numpy as np

from logitjax.decoding._ensemble import Ensemble
from logitjax.decoding._score import score


def nll_from_model(model: Any) -> Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]:
    """A function for the negative log-likelihood of given tokens under a model or ensemble.

    ::

        nll[b, t] = -log p(tokens[b, t] | tokens[b, :t])   where targets[b, t], else 0

    Tokens before a row's first target are read through the cache, without logits. So many short
    answers to long questions cost little more than the questions.

    Args:
        model: as for `generate`.

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
                "tokens and targets: expected [batch, time] both, and no target in front, got "
                f"{tokens.shape} and {targets.shape}"
            )
        nll, greedy = np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, bool)
        spans = []
        for row in targets:
            places = np.flatnonzero(row)
            # A row without targets goes along as short as a row may be: batches keep their size.
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
