"""What a step of fused decoding computes: logits made up, and the pass of one model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax import models


def made_up_logits(batch: int, vocab: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """Logits ``[batch, vocab]`` of a large model, an expert and a base."""
    rng = np.random.default_rng(seed)
    rank = rng.permuted(np.tile(np.arange(1, vocab + 1), (batch, 1)), axis=1)
    common = (-1.2 * np.log(rank)).astype(np.float32)
    rows = np.arange(batch)[:, None]
    peaks = rng.integers(0, vocab, (batch, 3))
    large, base = (common + rng.standard_normal(common.shape, np.float32) for _ in range(2))
    for values in (large, base):
        values[rows, peaks] += rng.uniform(2, 10, (batch, 3)).astype(np.float32)
    expert = base + 0.5 * rng.standard_normal(common.shape, np.float32)
    expert[rows, rng.integers(0, vocab, (batch, 2))] += rng.uniform(0, 8, (batch, 2))
    return jnp.asarray(large), jnp.asarray(expert), jnp.asarray(base)


def decoding_step(model: models.Decoder, batch: int) -> Callable[[], Any]:
    """A call that decodes one token of every row, after none."""
    listed = models.with_layout(model, "listed")
    graphdef, state = nnx.split(listed)
    cache = listed.init_cache(batch, 256)

    @jax.jit
    def step(state: Any, token: jax.Array, cache: Any) -> jax.Array:
        decoder = nnx.merge(graphdef, state)
        hidden, _ = decoder.hidden_states(token, cache=cache)
        return decoder.logits(hidden)

    token = jnp.ones((batch, 1), jnp.int32)
    return lambda: step(state, token, cache)
