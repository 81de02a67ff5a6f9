"""Keys of a config.json: what each family reads, transformers' defaults, and what changes nothing.

A key that is in neither table is refused where its value says anything: a model that computes
something else than its configuration asks for is worse than none.
"""

from collections.abc import Mapping
from typing import Any

from logitjax.storage import guard

_COMMON: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "tie_word_embeddings": False,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA = _COMMON | {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN2 = _COMMON | {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA2 = _COMMON | {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

# What a family reads, and transformers' default where a file leaves it out.
READ: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _COMMON
    | {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128, "attention_bias": False},
    "phi3": _COMMON
    | {
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 32_000,
        "pad_token_id": 32_000,
    },
    "gemma2": _GEMMA2,
    # transformers heeds no attn_logit_softcapping here.
    "gemma3_text": {k: v for k, v in _GEMMA2.items() if k != "attn_logit_softcapping"}
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
    },
    "gpt2": {
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
        "pad_token_id": None,
    },
}

FAMILIES = tuple(READ)

# Other names of the same, which transformers takes too.
ALIASES: dict[str, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
}

# Training, generation, tasks, precision, bookkeeping: none of it changes a logit.
_HARMLESS = {
    "architectures", "auto_map", "dtype", "finetuning_task", "model_type", "name_or_path",
    "prefix", "tokenizer_class", "torch_dtype", "transformers_version", "transformers.js_config",
    "unsloth_fixed", "unsloth_version", "attention_dropout", "attn_dropout", "attn_pdrop",
    "classifier_dropout", "embd_pdrop", "embed_pdrop", "hidden_dropout", "hidden_dropout_prob",
    "resid_pdrop", "gradient_checkpointing", "initializer_range", "neftune_noise_alpha",
    "router_aux_loss_coef", "attn_implementation", "cache_implementation",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "pretraining_tp",
    "reorder_and_upcast_attn", "return_dict", "torchscript", "use_bfloat16", "use_cache",
    "use_flash_attn", "use_return_dict", "use_reentrant", "id2label", "label2id", "num_labels",
    "problem_type", "task_specific_params", "summary_activation", "summary_first_dropout",
    "summary_last_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "sep_token_id",
    "unk_token_id", "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "temperature", "tf_legacy_loss", "top_k", "top_p", "typical_p", "is_decoder",
    "is_llama_config", "model_max_length", "n_ctx", "tie_last_hidden_states",
}  # fmt: skip
_HARMLESS_OF: dict[str, set[str]] = {
    # Parameters decide: a bias too many or too few is an error when tensors are read.
    "mistral": {"attention_bias"},
    "qwen2": {"attention_bias"},
    "phi3": {"attention_bias"},
    # Read under the name hidden_activation.
    "gemma2": {"hidden_act", "sliding_window_size"},
    "gemma3_text": {"hidden_act"},
    # Windows are read where there are any.
    "llama": {"max_window_layers", "use_sliding_window"},
    "gpt2": {"n_special", "output_past", "predict_special_tokens"},
}
# What changes nothing at these values.
_HARMLESS_AT: dict[str, dict[str, Any]] = {
    "phi3": {"full_attn_mod": 1, "interpolate_factor": 1},
}
# Of the vision half, which is not read.
_MULTIMODAL = {
    "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index", "image_token_id",
    "image_token_index", "mm_tokens_per_image", "text_config", "vision_config",
}  # fmt: skip


def check_keys(raw: Mapping[str, Any], family: str, where: str) -> None:
    """Refuse what might change the mathematics and is not known.

    Raises:
        ValueError: Names the key.
    """
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            raise ValueError(
                f"{where}: {key}: quantized weights are not read, "
                "use the unquantized checkpoint or a GGUF file"
            )
    known = {*READ[family], *ALIASES.get(family, {}), *_HARMLESS, *_HARMLESS_OF.get(family, ())}
    for key, value in raw.items():
        if key in known or key in _MULTIMODAL or key.startswith("_"):
            continue
        # A switch that is off, or nothing at all.
        if value in (None, False, 0, "", [], {}):
            continue
        if key in (at := _HARMLESS_AT.get(family, {})) and value == at[key]:
            continue
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ValueError(
            f"{where}: {key}={shown} is not known of {family} and may change its logits; "
            "take the key out if it does not"
        )


class Fields:
    """Values of a config.json by key, or transformers' default; of the right type, or an error."""

    def __init__(self, raw: Mapping[str, Any], family: str, where: str):
        names = ALIASES.get(family, {})
        self.raw = {names.get(key, key): value for key, value in raw.items()}
        self.where = where
        self._defaults = READ[family]

    def __getitem__(self, key: str) -> Any:
        return self.raw.get(key, self._defaults[key]) if key in self._defaults else None

    def wrong(self, key: str, expected: str) -> ValueError:
        return ValueError(f"{self.where}: {key}: expected {expected}, got {guard.short(self[key])}")

    def integer(self, key: str, least: int = 1) -> int:
        value = self.number(key)
        # A billion of layers is a list of a billion before any weight is missed.
        most = guard.LIMITS.layers if "layer" in key else guard.LIMITS.width
        if not least <= value <= most or value != int(value):
            raise self.wrong(key, f"an integer from {least} to {most}")
        return int(value)

    def number(self, key: str) -> float:
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        return value

    def maybe_integer(self, key: str) -> int | None:
        return None if self[key] is None else self.integer(key)

    def maybe_number(self, key: str) -> float | None:
        return None if self[key] is None else float(self.number(key))

    def flag(self, key: str) -> bool:
        # transformers takes None and 0 for false.
        if self[key] not in (True, False, None):
            raise self.wrong(key, "true or false")
        return bool(self[key])

    def mapping(self, key: str) -> dict[str, Any]:
        value = self[key]
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return dict(value or {})
