"""Phi-3 and Phi-4: Llama with fused projections, partly rotated heads, and longrope."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.models._config import DecoderConfig
from logitjax.models._family import GGUF_WEIGHTS, PreTokenizer
from logitjax.models._hf_fields import Fields, windows
from logitjax.models._hf_rope import rope_settings, scaling_kind, scaling_of
from logitjax.models.families import llama


def _read(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    scaling = scaling_of(fields)
    kind = scaling_kind(scaling)
    # Names of longrope in early configurations.
    if kind in ("su", "yarn"):
        kind = "longrope"
    if kind not in ("default", "longrope"):
        raise ValueError(f"{fields.where}: rope scaling: phi3 has longrope only, got {kind!r}")
    rope = rope_settings(fields, settings, scaling | {"rope_type": kind}, partial=True)
    return {"windows": windows(fields, heeds_types=False), **rope}


def _write(config: DecoderConfig) -> dict[str, Any]:
    raw, scaling = llama.LLAMA.write(config), config.rope_scaling
    if config.rotary_dim is not None:
        raw["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if scaling is not None:
        raw["original_max_position_embeddings"] = scaling.original_max_length
        # The first readers of Phi-3 accept only the keys of the factors.
        inner = {k: v for k, v in raw["rope_scaling"].items() if not k.startswith("original")}
        if scaling.factor == config.max_length / scaling.original_max_length:
            del inner["factor"]
        raw["rope_scaling"] = inner
    return raw


# Words of Phi-4-mini end before capitals, as in GPT-4o.
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve"
    r"|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QKV, _MLP = ("attention.query", "attention.key", "attention.value"), ("mlp.gate", "mlp.up")

PHI3 = dataclasses.replace(
    llama.LLAMA,
    name="phi3",
    architecture="Phi3ForCausalLM",
    keys=llama.KEYS | dict(
        vocab_size=32_064, hidden_size=3072, intermediate_size=8192,
        max_position_embeddings=4096, original_max_position_embeddings=4096,
        rms_norm_eps=1e-5, sliding_window=None,
        bos_token_id=1, eos_token_id=32_000, pad_token_id=32_000,
    ),
    read=_read,
    write=_write,
    weights=llama.LLAMA.weights
    | dict.fromkeys(_QKV, "model.layers.*.self_attn.qkv_proj")
    | dict.fromkeys(_MLP, "model.layers.*.mlp.gate_up_proj"),
    # Parameters decide: an extra or missing bias is an error when tensors are read.
    ignored=frozenset({"attention_bias"}),
    ignored_at={"full_attn_mod": 1, "interpolate_factor": 1},
    gguf="phi3",
    gguf_weights=GGUF_WEIGHTS
    | dict.fromkeys(_QKV, "blk.*.attn_qkv")
    | dict.fromkeys(_MLP, "blk.*.ffn_up"),
    gguf_interleaved=False,
    pre_tokenizers={"gpt-4o": PreTokenizer(pattern=_GPT4O)},
)  # fmt: skip
