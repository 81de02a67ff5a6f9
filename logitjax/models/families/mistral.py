"""Mistral: Llama with a sliding window."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.models._hf_fields import Fields, windows
from logitjax.models._hf_rope import rope_settings
from logitjax.models.families.llama import KEYS, LLAMA


def _read(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"windows": windows(fields, heeds_types=False), **rope_settings(fields, settings)}


MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    architecture="MistralForCausalLM",
    keys=KEYS | dict(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_key_value_heads=8,
        max_position_embeddings=131_072, sliding_window=4096, bos_token_id=1, eos_token_id=2,
    ),
    read=_read,
    # Parameters decide: an extra or missing bias is an error when tensors are read.
    ignored=frozenset({"attention_bias"}),
    # llama.cpp calls it llama.
    gguf=None,
)  # fmt: skip
