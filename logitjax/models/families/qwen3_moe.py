"""Qwen3-MoE: Qwen3 with experts in every layer."""

import dataclasses

from logitjax.models._family import gguf_experts
from logitjax.models.families.llama import LLAMA
from logitjax.models.families.qwen3 import QWEN3

_EXPERT = "model.layers.*.mlp.experts.#."

QWEN3_MOE = dataclasses.replace(
    QWEN3,
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    # Windows, and layers without experts, are refused: no published model has any.
    keys={k: v for k, v in QWEN3.keys.items() if "window" not in k} | dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_key_value_heads=4,
        head_dim=None, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=False,
    ),
    fields=QWEN3.fields | {
        "num_experts": "num_experts", "num_experts_per_tok": "experts_per_token",
        "moe_intermediate_size": "expert_size", "norm_topk_prob": "normalise_experts",
    },
    read=LLAMA.read,
    write=LLAMA.write,
    weights=QWEN3.weights | {
        "mlp.router": "model.layers.*.mlp.gate",
        **{f"mlp.experts.{name}": f"{_EXPERT}{name}_proj" for name in ("gate", "up", "down")},
    },
    # As transformers 5 writes it.
    aliases={"num_local_experts": "num_experts"},
    ignored=frozenset({"max_window_layers", "sliding_window"}),
    ignored_at={"decoder_sparse_step": 1},
    gguf="qwen3moe+experts",
    gguf_read=gguf_experts,
    pre_tokenizers={},
)  # fmt: skip
