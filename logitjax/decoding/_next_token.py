"""The logits of what comes next, without a cache: for tables of many short prompts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def next_token_program(graphdef: Any) -> Any:
    """Compiled: `(state, tokens [rows, length])` to the logits of the next token, float32."""

    @jax.jit
    def last(state: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        hidden, _ = model.hidden_states(tokens)
        return model.logits(hidden[:, -1:])[:, 0].astype(jnp.float32)

    return last
