"""Negative log-likelihood of given tokens, from any function that gives logits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.ops import logsumexp

# (tokens int32 [batch, time], targets bool [batch, time]) -> nll float32 [batch, time], or that and
# whether each token was the most likely one, bool [batch, time].
NllFn = Callable[[Any, Any], Any]


@jax.jit
def _token_nll(logits: Any, tokens: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    logits = logits[:, :-1].astype(jnp.float32)
    labels = tokens[:, 1:, None]
    nll = logsumexp(logits) - jnp.take_along_axis(logits, labels, axis=-1)[..., 0]
    greedy = logits.argmax(axis=-1) == labels[..., 0]
    first = ((0, 0), (1, 0))
    return (
        jnp.where(targets, jnp.pad(nll, first), 0.0),
        jnp.pad(greedy, first) & targets,
    )


def nll_from_apply(apply_fn: Callable[[Any], Any], *, with_greedy: bool = False) -> NllFn:
    """A function for the negative log-likelihood of tokens, from one for logits.

    ::

        nll[b, t] = -log p(tokens[b, t] | tokens[b, :t])   where targets[b, t], else 0

    Nothing is compiled here around ``apply_fn``: a closure over weights would carry them into the
    program as constants. Hand in something that is compiled already.

    Args:
        apply_fn: int32 ``[batch, time]`` to logits ``[batch, time, vocab]`` of the token after each
            position. Rows are padded at the end, which a causal model does not see.
        with_greedy: also say whether each token was the most likely one, which extraction strength
            and exact memorisation ask for.

    Returns:
        ``nll_fn(tokens, targets)``, giving float32 ``[batch, time]``, with ``with_greedy`` a pair
        of it and bool ``[batch, time]``. ``targets`` is False at position 0, which nothing
        predicts.

    >>> nll_fn = nll_from_apply(lambda tokens: jnp.zeros((*tokens.shape, 4)))
    >>> nll_fn(np.array([[3, 1, 2]]), np.array([[False, True, False]])).round(4)
    Array([[0.    , 1.3863, 0.    ]], dtype=float32)
    """

    def nll_fn(tokens: Any, targets: Any) -> Any:
        tokens, targets = jnp.asarray(tokens, jnp.int32), jnp.asarray(targets, bool)
        if tokens.ndim != 2 or tokens.shape != targets.shape:
            raise ValueError(
                f"tokens and targets: expected [batch, time] both, got {tokens.shape} and "
                f"{targets.shape}"
            )
        logits = apply_fn(tokens)
        if np.shape(logits)[:-1] != tokens.shape:
            raise ValueError(
                f"apply_fn: expected logits [batch, time, vocab] of tokens {tokens.shape}, got "
                f"{np.shape(logits)}"
            )
        nll, greedy = _token_nll(logits, tokens, targets)
        return (nll, greedy) if with_greedy else nll

    return nll_fn
