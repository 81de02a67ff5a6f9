"""config.json of Hugging Face, in and out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.models._config import DecoderConfig, Window
from logitjax.models._hf_fields import FAMILIES, Fields, check_keys
from logitjax.models._hf_rope import rope_settings, scaling_fields

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def config_from_hf(raw: Mapping[str, Any], *, where: str = "config.json") -> DecoderConfig:
    """The configuration that a Hugging Face ``config.json`` describes.

    Keys that are left out have transformers' defaults. A key that is neither read nor known to
    change nothing is refused, unless it is off.

    Args:
      raw: the parsed file. Of multimodal Gemma 3 the text part is taken.
      where: named in errors.

    Returns:
      A `DecoderConfig`.

    Raises:
      ValueError: for an unknown family, key or setting, or a value of the wrong type.

    >>> config_from_hf({"model_type": "gpt2", "vocab_size": 10, "n_embd": 8, "n_layer": 1,
    ...                 "n_head": 2, "n_positions": 16}).position
    'learned'
    """
    family = raw.get("model_type")
    if family == "gemma3":
        check_keys(raw, "gemma3_text", where)
        # Ids of tokens stand beside the two halves; older files have all settings there.
        inner = raw.get("text_config")
        text = dict(inner) if isinstance(inner, Mapping) else {}
        beside = {k: v for k, v in raw.items() if v is not None and k.endswith("token_id")}
        raw, family = {**text, **beside}, "gemma3_text"
    if family not in FAMILIES:
        raise ValueError(
            f"{where}: unknown model_type {family!r}, expected one of {', '.join(FAMILIES)}"
        )
    check_keys(raw, family, where)
    fields = Fields(raw, family, where)
    settings = _gpt2(fields) if family == "gpt2" else _llama(fields, family)
    return DecoderConfig(family=family, **settings, **_tokens(fields))


def _llama(fields: Fields, family: str) -> dict[str, Any]:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers")
    head_dim = fields.maybe_integer("head_dim") or hidden // heads
    gemma = family.startswith("gemma")
    bias = fields.flag("attention_bias")
    settings: dict[str, Any] = {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.maybe_integer("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "max_length": fields.integer("max_position_embeddings"),
        "activation": _activation(fields, "hidden_activation" if gemma else "hidden_act"),
        "norm_eps": float(fields.number("rms_norm_eps")),
        "windows": _windows(fields, family, layers),
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "qkv_bias": family == "qwen2" or bias,
        "output_bias": bias,
        "mlp_bias": fields.flag("mlp_bias"),
        "qk_norm": family in ("qwen3", "gemma3_text"),
        **rope_settings(fields, family, head_dim),
    }
    if gemma:
        settings |= {
            "norm_offset": 1.0,
            "post_norms": True,
            "embedding_scale": hidden**0.5,
            "query_scale": fields.number("query_pre_attn_scalar") ** -0.5,
            "attention_softcap": fields.maybe_number("attn_logit_softcapping"),
            "logits_softcap": fields.maybe_number("final_logit_softcapping"),
        }
    return settings


def _gpt2(fields: Fields) -> dict[str, Any]:
    hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.maybe_integer("n_inner") or 4 * hidden,
        "num_layers": fields.integer("n_layer"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_length": fields.integer("n_positions"),
        "activation": _activation(fields, "activation_function"),
        "gated_mlp": False,
        "norm": "layer",
        "norm_eps": float(fields.number("layer_norm_epsilon")),
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "position": "learned",
        "query_scale": None if fields.flag("scale_attn_weights") else 1.0,
        "tie_embeddings": fields.flag("tie_word_embeddings"),
    }


def _activation(fields: Fields, key: str) -> Any:
    name = fields[key]
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise fields.wrong(key, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _tokens(fields: Fields) -> dict[str, Any]:
    size = fields.integer("vocab_size")

    def known(key: str) -> tuple[int, ...]:
        ids = fields[key]
        ids = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise fields.wrong(key, "ids of tokens")
        # -1 is a habit of old files, and defaults may lie outside of a small vocabulary.
        return tuple(i for i in ids if 0 <= i < size)

    bos, pad = known("bos_token_id"), known("pad_token_id")
    return {
        "bos_id": bos[0] if bos else None,
        "eos_ids": known("eos_token_id"),
        "pad_id": pad[0] if pad else None,
    }


def _windows(fields: Fields, family: str, layers: int) -> tuple[Window, ...]:
    kinds = fields["layer_types"]
    if kinds is not None and (
        len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}
    ):
        raise ValueError(
            f"{fields.where}: layer_types: expected full_attention or sliding_attention "
            f"for each of {layers} layers"
        )
    window = fields["sliding_window"]
    if family.startswith("qwen") and not fields.flag("use_sliding_window"):
        window = None
    if kinds is None or family in ("mistral", "phi3"):
        if family == "gemma2":
            local = [i % 2 == 0 for i in range(layers)]
        elif family == "gemma3_text":
            period = fields.integer("sliding_window_pattern")
            local = [(i + 1) % period != 0 for i in range(layers)]
        elif family.startswith("qwen"):
            first = fields.integer("max_window_layers", least=0)
            local = [window is not None and i >= first for i in range(layers)]
        else:
            local = [window is not None] * layers
        # transformers heeds no layer_types in these families; other programs do.
        if kinds is not None and local != [kind == "sliding_attention" for kind in kinds]:
            raise ValueError(
                f"{fields.where}: layer_types: expected what sliding_window={window!r} says "
                f"of {family}, got {sorted(set(kinds))}"
            )
    else:
        local = [kind == "sliding_attention" for kind in kinds]
    if not any(local):
        return ()
    if window is None:
        raise fields.wrong("sliding_window", "a number for the layers of sliding_attention")
    width = fields.integer("sliding_window")
    return tuple(width if is_local else None for is_local in local)


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def config_to_hf(config: DecoderConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The ``config.json`` of a configuration; `config_from_hf` gives the same one back.

    Args:
      config: configuration of one of the known families.
      dtype: type of the stored tensors.

    Returns:
      A dict for JSON, in the field names that transformers and vLLM read.

    Raises:
      ValueError: for what Hugging Face's format of this family cannot say.

    >>> raw = {"model_type": "gpt2", "vocab_size": 10, "n_embd": 8, "n_layer": 1, "n_head": 2}
    >>> config = config_from_hf(raw)
    >>> config_from_hf(config_to_hf(config)) == config
    True
    """
    if config.family not in FAMILIES:
        raise ValueError(
            f"config: family {config.family!r} has no Hugging Face form, "
            f"expected one of {', '.join(FAMILIES)}"
        )
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos,
        "pad_token_id": config.pad_id,
        "torch_dtype": dtype,
    }
    raw |= _gpt2_fields(config) if config.family == "gpt2" else _llama_fields(config)
    if config_from_hf(raw) != _comparable(config):
        ours, theirs = _comparable(config), config_from_hf(raw)
        wrong = [f for f in vars(ours) if getattr(ours, f) != getattr(theirs, f)]
        raise ValueError(
            f"config: the Hugging Face form of {config.family} cannot say "
            + ", ".join(f"{f}={getattr(ours, f)!r}" for f in wrong)
        )
    return raw


def _comparable(config: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(config, segment_boundaries=())


def _gpt2_fields(config: DecoderConfig) -> dict[str, Any]:
    names = {"gelu_tanh": "gelu_new", "gelu": "gelu", "silu": "silu"}
    return {
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_length,
        "n_ctx": config.max_length,
        "activation_function": names[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.query_scale is None,
    }


def _llama_fields(config: DecoderConfig) -> dict[str, Any]:
    gemma = config.family.startswith("gemma")
    names = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "silu": "silu"}
    raw: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "hidden_activation" if gemma else "hidden_act": names[config.activation],
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling_fields(config),
        "attention_bias": config.output_bias,
    }
    if config.family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if config.rotary_dim is not None:
        raw["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if config.rope_scaling is not None and config.family == "phi3":
        raw["original_max_position_embeddings"] = config.rope_scaling.original_max_length
    windows = [w for w in config.layer_windows if w is not None]
    if config.family != "llama":
        raw["sliding_window"] = windows[0] if windows else None
    if gemma and not windows:
        # No layer has it, and transformers cannot run without a number there.
        raw["sliding_window"] = config.max_length
    if config.family.startswith("qwen"):
        raw["use_sliding_window"] = bool(windows)
        raw["max_window_layers"] = config.num_layers - len(windows)
    if gemma or (windows and config.family.startswith("qwen")):
        raw["layer_types"] = [
            "full_attention" if w is None else "sliding_attention" for w in config.layer_windows
        ]
    if gemma:
        raw["query_pre_attn_scalar"] = _integer(config.attention_scale**-2)
        raw["attn_logit_softcapping"] = config.attention_softcap
        raw["final_logit_softcapping"] = config.logits_softcap
    if config.rope_local_theta is not None:
        raw["rope_local_base_freq"] = config.rope_local_theta
    return raw


def _integer(value: float) -> int | float:
    return round(value) if abs(value - round(value)) < 1e-6 * value else value
