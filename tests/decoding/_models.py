"""Small decoders, and decoding without caches to compare with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax.decoding import DecodeOptions, Ensemble
from logitjax.models import Decoder, DecoderConfig, keep_layers
from tests._modules import with_weights

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
# Programs are compiled for options and shapes: tests that share these share them.
REPORTED = DecodeOptions(logprobs=True, top_logprobs=3, max_logit_bias=2, repetition=True)
NEW = 12
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 17], [20]]


@functools.cache
def decoder(seed: int = 0) -> Decoder:
    # Larger weights than at initialisation, so that contexts matter.
    return with_weights(
        lambda: Decoder(CONFIG, rngs=nnx.Rngs(0), layout="listed"), seed=seed, size=0.16
    )


@functools.cache
def disturbed(seed: int, size: float = 0.15) -> Decoder:
    """`decoder(0)` with noise on its weights: often of the same opinion."""
    graphdef, state = nnx.split(decoder())
    rng = np.random.default_rng(seed)

    def moved(leaf):
        values = np.asarray(leaf)
        return np.float32(values + size * values.std() * rng.normal(size=values.shape))

    return nnx.merge(graphdef, jax.tree.map(moved, state))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def next_logits(model: Decoder, tokens) -> np.ndarray:
    """Logits after ``tokens``, by a forward pass without a cache."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(*nnx.split(model), padded))[0, len(tokens) - 1]


def slow_greedy(logits_after, prompt, count: int) -> list[int]:
    """Greedy decoding from ``logits_after(new_tokens)``."""
    new: list[int] = []
    for _ in range(count):
        new.append(int(np.argmax(logits_after([*prompt, *new]))))
    return new


def moved(large, experts, bases, vocab_where=None):
    """Proxy tuning with a weight a expert, so that their order matters."""
    weights = np.float32([0.7, 0.4])[: len(experts)].reshape(-1, *(1,) * large.ndim)
    shift = (weights * (experts - bases)).sum(0)
    return large + shift, {"size": jnp.abs(shift).max(axis=-1)}


THEIRS = [[[30, 31], [32], [33, 34, 35]], None, [[40], [41, 42, 43, 44], [45]]]


@functools.cache
def small(seed: int) -> Decoder:
    return keep_layers(decoder(seed), [1])


@functools.cache
def fused_ensemble() -> tuple[Ensemble, list]:
    """Two experts and a base for both, and the prompts of their own."""
    ensemble = Ensemble(decoder(), experts=[small(1), small(2)], bases=[small(3)], fuse=moved)
    return ensemble, THEIRS
