"""Small random configurations, one a family, and the weights that go with them."""

import zlib

import numpy as np

# What transformers' config classes take; tests/models/make_goldens.py builds its models from them.
_COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_GEMMA = _COMMON | {
    "head_dim": 12,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 9,
    "sliding_window": 6,
    "hidden_activation": "gelu_pytorch_tanh",
}
HF_CONFIGS: dict[str, dict] = {
    "smollm2": _COMMON | {"model_type": "llama", "tie_word_embeddings": True},
    "llama3": _COMMON
    | {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_bias": _COMMON | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_yarn": _COMMON
    | {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mixtral": _COMMON | {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": _COMMON
    | {
        "model_type": "qwen3_moe",
        "head_dim": 12,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "gemma": _COMMON | {"model_type": "gemma", "head_dim": 12, "hidden_act": "gelu"},
    "olmo2": _COMMON | {"model_type": "olmo2"},
    "olmo3": _COMMON
    | {
        "model_type": "olmo3",
        "num_hidden_layers": 5,
        "sliding_window": 6,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 1.2,
        },
    },
    "smollm3": _COMMON | {"model_type": "smollm3", "num_hidden_layers": 5},
    "granite": _COMMON
    | {
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "glm4": _COMMON | {"model_type": "glm4", "head_dim": 16},
    "mistral": _COMMON | {"model_type": "mistral", "sliding_window": 7, "head_dim": 16},
    "qwen2": _COMMON | {"model_type": "qwen2"},
    "qwen2_window": _COMMON
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": _COMMON | {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
    "phi3": _COMMON | {"model_type": "phi3", "sliding_window": 9},
    "phi4_mini": _COMMON
    | {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3],
            "long_factor": [1.5, 2.0, 4.0],
        },
        "sliding_window": None,
    },
    "phi4_mini_long": _COMMON
    | {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3],
            "long_factor": [1.5, 2.0, 4.0],
        },
        "sliding_window": None,
    },
    "gemma2": _GEMMA
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
        "num_hidden_layers": 4,
    },
    "gemma3": _GEMMA
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 8,
        "sliding_window_pattern": 3,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 96,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}

TOKENS = np.random.Generator(np.random.PCG64(7)).integers(3, 96, size=(2, 20)).astype(np.int32)

GOLDEN_POSITIONS = [0, 8, 14, 19]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that depend on the tensor's name only."""
    values = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).normal(size=shape)
    scale = 0.3 if len(shape) == 1 else 0.12
    values = values * scale
    if name.endswith(("norm.weight", "layernorm.weight", "ln_1.weight", "ln_2.weight")):
        values = values + 1.0
    return values.astype(np.float32)
