"""Gemma 2: norms after the blocks, soft caps, and a window on every other layer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from logitjax.models._config import DecoderConfig
from logitjax.models._hf_fields import Fields, layer_types, windows
from logitjax.models._hf_rope import rope_settings
from logitjax.models.families import llama


def _read(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"windows": windows(fields, lambda i: i % 2 == 0), **_scales(fields, settings)}
    return sizes | rope_settings(fields, settings)


def _scales(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "embedding_scale": settings["hidden_size"] ** 0.5,
        "query_scale": fields.number("query_pre_attn_scalar") ** -0.5,
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    raw, scalar = llama.LLAMA.write(config), config.attention_scale**-2
    is_integer = abs(scalar - round(scalar)) < 1e-6 * scalar
    return raw | {
        "query_pre_attn_scalar": round(scalar) if is_integer else scalar,
        # If no layer has one, transformers still requires a number there.
        "sliding_window": raw["sliding_window"] or config.max_length,
        "layer_types": layer_types(config),
    }


def _gguf_gemma(
    get: Callable[..., Any], settings: Mapping[str, Any], period: int, window: int, largest: int
) -> dict[str, Any]:
    """Scales, and windows on all but each `period`-th layer, `window` wide unless the file says."""
    layers, hidden = settings["num_layers"], settings["hidden_size"]
    width = int(get("attention.sliding_window") or window)
    # As in llama.cpp, only the largest model scales queries by hidden_size / num_heads.
    scalar = hidden / settings["num_heads"] if layers == largest else settings["head_dim"]
    return {
        "embedding_scale": hidden**0.5,
        "query_scale": scalar**-0.5,
        "windows": tuple(None if (i + 1) % period == 0 else width for i in range(layers)),
    }


def _gguf_read(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return _gguf_gemma(get, settings, period=2, window=4096, largest=46) | {
        "attention_softcap": float(get("attn_logit_softcapping", 50.0)),
        "logits_softcap": float(get("final_logit_softcapping", 30.0)),
    }


GEMMA2 = dataclasses.replace(
    llama.LLAMA,
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    keys={k: v for k, v in llama.KEYS.items() if k != "hidden_act"} | dict(
        vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        hidden_activation="gelu_pytorch_tanh", max_position_embeddings=8192,
        tie_word_embeddings=True, attention_bias=False, query_pre_attn_scalar=256,
        sliding_window=4096, final_logit_softcapping=30.0, attn_logit_softcapping=50.0,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    ),
    fields={k: v for k, v in llama.LLAMA.fields.items() if k != "hidden_act"} | dict(
        hidden_activation="activation", final_logit_softcapping="logits_softcap",
        attn_logit_softcapping="attention_softcap",
    ),
    settings={"norm_offset": 1.0, "post_norms": True},
    read=_read,
    write=_write,
    weights=llama.LLAMA.weights
    | {
        "attention_post_norm": "model.layers.*.post_attention_layernorm",
        "mlp_norm": "model.layers.*.pre_feedforward_layernorm",
        "mlp_post_norm": "model.layers.*.post_feedforward_layernorm",
    },
    # Read under the name hidden_activation.
    ignored=frozenset({"hidden_act", "sliding_window_size"}),
    gguf="gemma2",
    gguf_read=_gguf_read,
    gguf_interleaved=False,
)  # fmt: skip
