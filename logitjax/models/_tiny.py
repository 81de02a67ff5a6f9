"""A toy decoder that needs no files: for smoke runs and tests."""

from typing import Any

import jax
from flax import nnx

from logitjax.models._config import DecoderConfig
from logitjax.models._decoder import Decoder


def tiny_seed(spec: str) -> int | None:
    """The seed of `tiny` or `tiny:SEED`; None for any other model."""
    kind, _, seed = spec.partition(":")
    if kind != "tiny":
        return None
    if seed and not seed.isdigit():
        raise ValueError(f"model: expected tiny or tiny:SEED, got {spec!r}")
    return int(seed or 0)


def tiny_config(*, layers: int = 2) -> DecoderConfig:
    return DecoderConfig(
        # Bytes and the end of a text, as in `byte_tokenizer`.
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_length=512,
    )


# One program for all seeds: a separate initialiser would be several.
@nnx.jit
def tiny_decoder(seed: Any) -> Decoder:
    """A random decoder of a few thousand weights for `byte_tokenizer`."""
    return Decoder(tiny_config(), rngs=nnx.Rngs(jax.random.key(seed)))
