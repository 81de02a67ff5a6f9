"""Gemma 1: Llama with norms scaled by 1 + weight, wide heads, and a scaled embedding."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from logitjax.models._hf_fields import Fields
from logitjax.models.families import llama


def _read(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    # Official files say gelu, but mean its approximation.
    names = {"activation": "gelu_tanh"} if fields["hidden_act"] == "gelu" else {}
    return llama.LLAMA.read(fields, settings) | names | _scale(settings)


def _scale(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"embedding_scale": settings["hidden_size"] ** 0.5}


def _gguf_read(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return _scale(settings)


GEMMA = dataclasses.replace(
    llama.LLAMA,
    name="gemma",
    architecture="GemmaForCausalLM",
    keys=llama.KEYS | dict(
        vocab_size=256_000, hidden_size=3072, intermediate_size=24_576, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=16, head_dim=256,
        hidden_act="gelu_pytorch_tanh", max_position_embeddings=8192, tie_word_embeddings=True,
        attention_bias=False, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    ),
    fields={k: v for k, v in llama.LLAMA.fields.items() if k != "mlp_bias"},
    settings={"norm_offset": 1.0},
    read=_read,
    # A second name, which transformers does not read here.
    ignored=frozenset({"hidden_activation"}),
    gguf="gemma",
    gguf_read=_gguf_read,
    gguf_interleaved=False,
    pre_tokenizers={},
)  # fmt: skip
