"""Shapes of the decoders that presets name, so that nothing has to be fetched to plan for them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax import models, training

_QWEN = models.DecoderConfig(
    vocab_size=152_064,
    hidden_size=5120,
    intermediate_size=13_824,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    qkv_bias=True,
    tie_embeddings=False,
    max_length=32_768,
)
KNOWN: dict[str, models.DecoderConfig] = {
    "hf:microsoft/phi-4": dataclasses.replace(
        _QWEN,
        vocab_size=100_352,
        intermediate_size=17_920,
        num_layers=40,
        num_kv_heads=10,
        qkv_bias=False,
        max_length=16_384,
    ),
    "hf:Qwen/Qwen2.5-14B-Instruct": _QWEN,
    "hf:Qwen/Qwen2.5-Coder-14B-Instruct": _QWEN,
    "hf:mistralai/Mistral-Small-24B-Instruct-2501": dataclasses.replace(
        _QWEN,
        vocab_size=131_072,
        intermediate_size=32_768,
        num_layers=40,
        num_heads=32,
        qkv_bias=False,
    ),
    "hf:meta-llama/Llama-2-13b-hf": dataclasses.replace(
        _QWEN,
        vocab_size=32_000,
        num_layers=40,
        num_kv_heads=40,
        qkv_bias=False,
        max_length=4096,
    ),
    "hf:TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": models.DecoderConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        tie_embeddings=False,
    ),
    "hf:distilbert/distilgpt2": models.config_from_hf(
        {
            "model_type": "gpt2",
            "vocab_size": 50_257,
            "n_embd": 768,
            "n_layer": 6,
            "n_head": 12,
            "n_positions": 1024,
        }
    ),
    "hf:meta-llama/Llama-2-7b-chat-hf": dataclasses.replace(
        _QWEN,
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        qkv_bias=False,
        max_length=4096,
    ),
    "smollm2": models.DecoderConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_length=8192,
    ),
}


def decoder_config(spec: str) -> models.DecoderConfig:
    """The shape of a model: a known name, or what its own files say."""
    if spec in KNOWN:
        return KNOWN[spec]
    return models.load_config(spec)


def abstract_decoder(config: models.DecoderConfig, **options: Any) -> tuple[Any, Any]:
    """Graph definition and abstract parameters: no number is made."""
    model = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0), **options))
    apply_fn, params = models.from_nnx(model)
    return apply_fn.graphdef, params


def rows(mesh: Any, count: int, **columns: tuple[Any, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch: by name a dtype and the shape of one row, split as training splits it."""
    sharding = training.BatchLayout(mesh).sharding
    return {
        name: jax.ShapeDtypeStruct((count, *shape), jnp.dtype(dtype), sharding=sharding)
        for name, (dtype, *shape) in columns.items()
    }


def replicated(mesh: Any, tree: Any) -> Any:
    """Abstract arrays of which every device holds a copy."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def packed(mesh: Any, count: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of packed text."""
    names = ("tokens", "segment_ids", "positions")
    columns = dict.fromkeys(names, (jnp.int32, length))
    return rows(mesh, count, **columns, loss_mask=(jnp.bool_, length))
