"""Llama 2 and 3, SmolLM2, and the settings shared by similar families."""

from collections.abc import Mapping
from typing import Any

from logitjax.models._config import DecoderConfig
from logitjax.models._family import Family, PreTokenizer
from logitjax.models._hf_fields import Fields, windows
from logitjax.models._hf_rope import rope_settings, scaling_fields

# Keys that every similar family reads.
KEYS: dict[str, Any] = dict(
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=None, head_dim=None,
    hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10_000.0, rope_scaling=None,
    rope_parameters=None, partial_rotary_factor=None, original_max_position_embeddings=None,
    tie_word_embeddings=False, layer_types=None,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
# Pieces of Llama 3, which others use with another number of digits.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = PreTokenizer(pattern=PATTERN, ignore_merges=True, add_bos=True)


def _read(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"windows": windows(fields), **rope_settings(fields, settings)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    window = next(filter(None, config.layer_windows), None)
    rope = {"rope_theta": config.rope_theta, "rope_scaling": scaling_fields(config)}
    return rope | {"sliding_window": window}


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    keys=KEYS | dict(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008,
        max_position_embeddings=2048, attention_bias=False, mlp_bias=False,
        bos_token_id=1, eos_token_id=2,
    ),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "max_position_embeddings": "max_length",
        "hidden_act": "activation",
        "rms_norm_eps": "norm_eps",
        "attention_bias": "output_bias",
        "mlp_bias": "mlp_bias",
        "tie_word_embeddings": "tie_embeddings",
    },
    read=_read,
    write=_write,
    weights={
        "embedding": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
        "attention_norm": "model.layers.*.input_layernorm",
        "mlp_norm": "model.layers.*.post_attention_layernorm",
        "attention.query": "model.layers.*.self_attn.q_proj",
        "attention.key": "model.layers.*.self_attn.k_proj",
        "attention.value": "model.layers.*.self_attn.v_proj",
        "attention.output": "model.layers.*.self_attn.o_proj",
        "attention.query_norm": "model.layers.*.self_attn.q_norm",
        "attention.key_norm": "model.layers.*.self_attn.k_norm",
        "mlp.gate": "model.layers.*.mlp.gate_proj",
        "mlp.up": "model.layers.*.mlp.up_proj",
        "mlp.down": "model.layers.*.mlp.down_proj",
    },
    # Windows are read if there are any.
    ignored=frozenset({"max_window_layers", "use_sliding_window"}),
    # A buffer of old checkpoints.
    unread=r".*rotary_emb\.inv_freq",
    gguf="llama",
    gguf_interleaved=True,
    pre_tokenizers={
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer(pattern=PATTERN)),
        "smollm": PreTokenizer(digits=True),
    },
)  # fmt: skip
