"""Small decoders, and decoding without caches to compare with."""

import functools

import jax
import numpy as np
from flax import nnx

from logitjax.models import Decoder, DecoderConfig

# One layer with a ring of 6 slots and one without a window.
CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    windows=(6, None),
    tie_embeddings=False,
)
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 17], [20]]


@functools.cache
def decoder(seed: int = 0) -> Decoder:
    model = Decoder(CONFIG, rngs=nnx.Rngs(seed), layout="listed")
    # Larger weights than at initialisation, so that contexts matter.
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 1 else leaf, state)
    return nnx.merge(graphdef, state)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def next_logits(model: Decoder, tokens) -> np.ndarray:
    """Logits after ``tokens``, by a forward pass without a cache."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(*nnx.split(model), padded)[0, len(tokens) - 1])


def slow_greedy(logits_after, prompt, count: int) -> list[int]:
    """Greedy decoding from ``logits_after(new_tokens)``."""
    new: list[int] = []
    for _ in range(count):
        new.append(int(np.argmax(logits_after([*prompt, *new]))))
    return new
