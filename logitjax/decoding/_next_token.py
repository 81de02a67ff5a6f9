"""The logits of what comes next, without a cache: for tables of many short prompts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import Float, Int

from logitjax.models import Decoder
from logitjax.ops import Array


def next_token_program(graphdef: Any) -> Any:
    """Compiled: `(state, tokens [rows, length])` to the logits of the next token, float32."""

    @jax.jit
    def last(state: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        hidden, _ = model.hidden_states(tokens)
        return model.logits(hidden[:, -1:])[:, 0].astype(jnp.float32)

    return last


def next_token_logits(
    model: Decoder, prompts: Int[Array, "n length"], *, batch_size: int = 16
) -> Float[np.ndarray, "n vocab"]:
    """The logits that follow each of many prompts of one length, on the host.

    Args:
        model: The decoder.
        prompts: `[n, length]` token ids.
        batch_size: Number of prompts in a forward pass.

    Returns:
        `[n, vocab]` float32.
    """
    graphdef, state = nnx.split(model)
    last, parts = next_token_program(graphdef), []
    prompts = np.asarray(prompts)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        short = batch_size - len(batch)
        batch = np.concatenate([batch, np.repeat(batch[-1:], short, 0)]) if short else batch
        parts.append(np.asarray(last(state, batch))[: batch_size - short])
        if start // batch_size % 10 == 0:
            logging.info("prompt %d of %d", start, len(prompts))
    return np.concatenate(parts)
