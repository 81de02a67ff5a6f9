"""Qwen3: Qwen2 with norms of queries and keys in place of biases."""

import dataclasses

from logitjax.models.families.qwen2 import QWEN2

QWEN3 = dataclasses.replace(
    QWEN2,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=QWEN2.keys | {"head_dim": 128, "attention_bias": False},
    settings={"qk_norm": True},
    ignored=frozenset(),
    gguf="qwen3",
)
