"""GLM-4: norms on both sides, half of a head rotated in pairs of neighbours, a fused MLP."""

import dataclasses
import functools
from typing import Any

from logitjax.models._config import DecoderConfig
from logitjax.models._family import GGUF_WEIGHTS, PreTokenizer
from logitjax.models._hf_rope import rope_settings
from logitjax.models.families import llama

_ENDS = [151_329, 151_336, 151_338]
_MLP = ("mlp.gate", "mlp.up")


def _write(config: DecoderConfig) -> dict[str, Any]:
    return llama.LLAMA.write(config) | {"partial_rotary_factor": config.rope_dim / config.head_dim}


GLM4 = dataclasses.replace(
    llama.LLAMA,
    name="glm4",
    architecture="Glm4ForCausalLM",
    keys=llama.KEYS | dict(
        vocab_size=151_552, hidden_size=4096, intermediate_size=13_696, num_hidden_layers=40,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=131_072,
        rms_norm_eps=1.5625e-7, attention_bias=True, partial_rotary_factor=0.5,
        eos_token_id=_ENDS, pad_token_id=151_329,
    ),
    fields={k: v for k, v in llama.LLAMA.fields.items() if k != "mlp_bias"}
    | {"attention_bias": "qkv_bias"},
    settings={"post_norms": True},
    read=functools.partial(rope_settings, partial=True),
    write=_write,
    weights=llama.LLAMA.weights
    | dict.fromkeys(_MLP, "model.layers.*.mlp.gate_up_proj")
    | {
        "attention_post_norm": "model.layers.*.post_self_attn_layernorm",
        "mlp_post_norm": "model.layers.*.post_mlp_layernorm",
    },
    interleaved=True,
    gguf="glm4",
    gguf_weights=GGUF_WEIGHTS | dict.fromkeys(_MLP, "blk.*.ffn_up"),
    pre_tokenizers={"glm4": PreTokenizer(pattern=llama.PATTERN, ignore_merges=True)},
)  # fmt: skip

# The earlier GLM-4-9B has only the first norms.
GLM = dataclasses.replace(
    GLM4, name="glm", architecture="GlmForCausalLM", settings={}, gguf=None
)  # fmt: skip
