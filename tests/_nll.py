"""The negative log-likelihood of tokens from any function that gives logits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.ops import logsumexp


@jax.jit
def _token_nll(logits: Any, tokens: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    logits = logits[:, :-1].astype(jnp.float32)
    labels = tokens[:, 1:, None]
    nll = logsumexp(logits) - jnp.take_along_axis(logits, labels, axis=-1)[..., 0]
    greedy = logits.argmax(axis=-1) == labels[..., 0]
    first = ((0, 0), (1, 0))
    return (jnp.where(targets, jnp.pad(nll, first), 0.0), jnp.pad(greedy, first) & targets)


def nll_from_apply(
    apply_fn: Callable[[Any], Any], *, with_greedy: bool = False
) -> Callable[..., Any]:
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
