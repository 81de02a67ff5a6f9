"""Models by name, as experiments' flags give them."""

from typing import Any

import jax.numpy as jnp
import tokenizers
from flax import nnx

from logitjax.models import (
    DECODER_RULES,
    Decoder,
    DecoderConfig,
    Tokenizer,
    check_tokenizer,
    load_model,
    load_tokenizer,
)


def byte_tokenizer() -> Tokenizer:
    """Text as its UTF-8 bytes, plus an end-of-text token: no files needed."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
    backend.add_special_tokens(["<|end|>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, eos_id=len(vocab), pad_id=len(vocab))


def tiny_decoder(seed: int = 0, *, layers: int = 2) -> Decoder:
    """A random decoder of a few thousand weights for `byte_tokenizer`: for smoke runs and tests."""
    config = DecoderConfig(
        vocab_size=byte_tokenizer().vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_length=512,
    )
    return Decoder(config, rngs=nnx.Rngs(seed))


def load(
    spec: str,
    *,
    dtype: str = "float32",
    layout: str = "stacked",
    remat: str = "none",
    mesh: Any = None,
) -> tuple[Decoder, Tokenizer]:
    """A decoder and its tokenizer: ``tiny[:SEED]``, or what `logitjax.models.load_model` takes.

    With a mesh, every tensor goes straight into the shards that training rules give it.
    """
    kind, _, seed = spec.partition(":")
    if kind == "tiny":
        return tiny_decoder(int(seed or 0)), byte_tokenizer()
    tokenizer = load_tokenizer(spec)
    model = load_model(
        spec,
        dtype=jnp.dtype(dtype),
        layout=layout,
        remat=remat,
        mesh=mesh,
        rules=DECODER_RULES,
    )
    check_tokenizer(model.config, tokenizer)
    return model, tokenizer


def load_tokenizer_of(spec: str) -> Tokenizer:
    """The tokenizer alone, for packing text before a model is in memory."""
    return byte_tokenizer() if spec.partition(":")[0] == "tiny" else load_tokenizer(spec)
