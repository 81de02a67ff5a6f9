"""How well a head predicts cached positions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax.vq._hidden_cache import HiddenCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadQuality:
    """What a head says of positions whose next token is known.

    Attributes:
        perplexity: Exponential of the mean cross-entropy.
        accuracy: Share of positions at which the likeliest token comes next.
        tokens: The likeliest token of each position, `[count]`.
    """

    perplexity: float
    accuracy: float
    tokens: np.ndarray


def measure_head(model: Any, cache: HiddenCache, *, block_size: int = 256) -> HeadQuality:
    """Perplexity of a decoder's head on hidden states that the decoder made before.

    Args:
        model: A `logitjax.models.Decoder` with any head; only the head is run.
        cache: Positions with their labels, as of `cache_hidden_states`.
        block_size: Number of positions at a time; memory is `block_size x vocab`.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: Any, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        # One position a row, as decoding has it.
        logits = nnx.merge(graphdef, state).logits(hidden[:, None])[:, 0].astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, logits.argmax(-1)

    losses, tokens = [], []
    for start in range(0, len(cache), block_size):
        hidden = np.asarray(cache.hidden[start : start + block_size], np.float32)
        labels = np.asarray(cache.labels[start : start + block_size])
        here = len(labels)
        # All blocks of one length, for one program.
        hidden = np.pad(hidden, ((0, block_size - here), (0, 0)))
        loss, token = run(state, hidden, np.pad(labels, (0, block_size - here)))
        losses.append(np.asarray(loss)[:here])
        tokens.append(np.asarray(token)[:here])
    likeliest = np.concatenate(tokens)
    return HeadQuality(
        perplexity=float(np.exp(np.concatenate(losses).mean())),
        accuracy=float((likeliest == np.asarray(cache.labels)).mean()),
        tokens=likeliest,
    )
