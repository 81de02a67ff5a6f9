"""Granite 3: Llama with factors of embedding, scores, residuals and logits."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from logitjax.models._family import PreTokenizer
from logitjax.models.families import llama

# For each key of a config.json its field, and the key of GGUF files.
_FACTORS = {
    "embedding_multiplier": ("embedding_scale", "embedding_scale"),
    "residual_multiplier": ("residual_scale", "residual_scale"),
    "logits_scaling": ("logits_divisor", "logit_scale"),
    "attention_multiplier": ("query_scale", "attention.scale"),
}


def _gguf_read(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {field: float(get(key, 1.0)) for field, key in _FACTORS.values()}


GRANITE = dataclasses.replace(
    llama.LLAMA,
    name="granite",
    architecture="GraniteForCausalLM",
    keys=llama.LLAMA.keys | dict.fromkeys(_FACTORS, 1.0),
    fields=llama.LLAMA.fields | {key: field for key, (field, _) in _FACTORS.items()},
    gguf="granite",
    gguf_read=_gguf_read,
    pre_tokenizers={"refact": PreTokenizer(digits=True)},
)
