"""Qwen3-MoE: Qwen3 with experts in every layer, and one window for all where it has one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.models._config import DecoderConfig
from logitjax.models._hf_fields import Fields, windows
from logitjax.models._hf_rope import rope_settings
from logitjax.models.families.llama import LLAMA
from logitjax.models.families.qwen3 import QWEN3

_EXPERT = "model.layers.*.mlp.experts.#."


def _read(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    found = windows(fields, off=not fields.flag("use_sliding_window"), heeds_types=False)
    return {"windows": found, **rope_settings(fields, settings)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    return LLAMA.write(config) | {"use_sliding_window": any(config.windows)}


QWEN3_MOE = dataclasses.replace(
    QWEN3,
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys={k: v for k, v in QWEN3.keys.items() if k != "max_window_layers"} | dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_key_value_heads=4,
        head_dim=None, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=False,
    ),
    fields=QWEN3.fields | {
        "num_experts": "num_experts", "num_experts_per_tok": "experts_per_token",
        "moe_intermediate_size": "expert_size", "norm_topk_prob": "normalise_experts",
    },
    read=_read,
    write=_write,
    weights=QWEN3.weights | {
        "mlp.router": "model.layers.*.mlp.gate",
        "mlp.experts.gate": _EXPERT + "gate_proj",
        "mlp.experts.up": _EXPERT + "up_proj",
        "mlp.experts.down": _EXPERT + "down_proj",
    },
    aliases={"num_local_experts": "num_experts"},  # as transformers 5 writes it
    ignored=frozenset({"max_window_layers"}),
    # Layers without experts have no place here; no published model has any.
    ignored_at={"decoder_sparse_step": 1},
    gguf=None,
    pre_tokenizers={},
)  # fmt: skip
