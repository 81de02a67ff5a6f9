"""config.json of Hugging Face, in and out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.models._config import DecoderConfig, RopeScaling

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gpt2",
)  # fmt: skip

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

    Args:
      raw: the parsed file. Of multimodal Gemma 3 the text part is taken.
      where: named in errors.

    Returns:
      A `DecoderConfig`.

    Raises:
      ValueError: for an unknown family, a missing field, or a setting that is not supported.

    >>> config_from_hf({"model_type": "gpt2", "vocab_size": 10, "n_embd": 8, "n_layer": 1,
    ...                 "n_head": 2, "n_positions": 16}).position
    'learned'
    """
    raw = dict(raw)
    if raw.get("model_type") == "gemma3" and "text_config" in raw:
        raw = {**raw["text_config"], "model_type": "gemma3_text"}
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{where}: unknown model_type {family!r}, expected one of {', '.join(FAMILIES)}"
        )

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ValueError(f"{where}: field {key!r} is missing")
        return raw[key]

    if family == "gpt2":
        return _gpt2(raw, need, where)
    hidden, heads, layers = (
        int(need(k)) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    head_dim = int(raw.get("head_dim") or _DEFAULT_HEAD_DIM.get(family) or hidden // heads)
    gemma = family.startswith("gemma")
    activation = raw.get("hidden_activation") if gemma else raw.get("hidden_act", "silu")
    theta, local_theta, scaling, rotary = _rope(raw, family, where)
    rotary_dim = int(head_dim * rotary)
    settings: dict[str, Any] = {
        "vocab_size": int(need("vocab_size")),
        "hidden_size": hidden,
        "intermediate_size": int(need("intermediate_size")),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": int(raw.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "family": family,
        "max_length": int(raw.get("max_position_embeddings") or 2048),
        "activation": _activation(activation or ("gelu_pytorch_tanh" if gemma else "silu"), where),
        "norm_eps": float(raw.get("rms_norm_eps") or (1e-5 if family == "phi3" else 1e-6)),
        "rope_theta": theta,
        "rope_local_theta": local_theta,
        "rope_scaling": scaling,
        "rotary_dim": None if rotary_dim == head_dim else rotary_dim,
        "windows": _windows(raw, family, layers),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", gemma)),
        "qkv_bias": family == "qwen2" or bool(raw.get("attention_bias", False)),
        "output_bias": bool(raw.get("attention_bias", False)),
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "qk_norm": family in ("qwen3", "gemma3_text"),
        **_tokens(raw),
    }
    if gemma:
        settings |= {
            "norm_offset": 1.0,
            "post_norms": True,
            "embedding_scale": hidden**0.5,
            "query_scale": float(raw.get("query_pre_attn_scalar", 256)) ** -0.5,
            "attention_softcap": raw.get("attn_logit_softcapping"),
            "logits_softcap": raw.get("final_logit_softcapping"),
        }
    return DecoderConfig(**settings)


_DEFAULT_HEAD_DIM = {"gemma2": 256, "gemma3_text": 256, "qwen3": 128}


def _gpt2(raw: dict, need: Any, where: str) -> DecoderConfig:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if raw.get(key):
            raise ValueError(f"{where}: {key} is not supported")
    hidden, heads = int(need("n_embd")), int(need("n_head"))
    return DecoderConfig(
        vocab_size=int(need("vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(raw.get("n_inner") or 4 * hidden),
        num_layers=int(need("n_layer")),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        family="gpt2",
        max_length=int(raw.get("n_positions") or 1024),
        activation=_activation(raw.get("activation_function", "gelu_new"), where),
        gated_mlp=False,
        norm="layer",
        norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        position="learned",
        tie_embeddings=bool(raw.get("tie_word_embeddings", True)),
        **_tokens(raw),
    )


def _activation(name: str, where: str) -> Any:
    if name not in _ACTIVATIONS:
        raise ValueError(f"{where}: unknown activation {name!r}")
    return _ACTIVATIONS[name]


def _tokens(raw: dict) -> dict[str, Any]:
    eos = raw.get("eos_token_id")
    eos = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    return {"bos_id": raw.get("bos_token_id"), "eos_ids": eos, "pad_id": raw.get("pad_token_id")}


def _windows(raw: dict, family: str, layers: int) -> tuple:
    window = raw.get("sliding_window")
    if window is None or (family.startswith("qwen") and not raw.get("use_sliding_window")):
        return ()
    kinds = raw.get("layer_types")
    if kinds is None:
        if family == "gemma2":
            local = [i % 2 == 0 for i in range(layers)]
        elif family == "gemma3_text":
            period = int(raw.get("sliding_window_pattern") or 6)
            local = [(i + 1) % period != 0 for i in range(layers)]
        elif family.startswith("qwen"):
            local = [i >= int(raw.get("max_window_layers", 28)) for i in range(layers)]
        else:
            local = [family in ("mistral", "phi3")] * layers
    else:
        local = [kind == "sliding_attention" for kind in kinds]
    return tuple(int(window) if is_local else None for is_local in local) if any(local) else ()


def _rope(raw: dict, family: str, where: str) -> tuple[float, float | None, Any, float]:
    """theta, local theta, scaling and rotated share, from either generation of the format."""
    parameters = raw.get("rope_parameters")
    theta = raw.get("rope_theta")
    local = raw.get("rope_local_base_freq")
    scaling = raw.get("rope_scaling")
    rotary = raw.get("partial_rotary_factor")
    if parameters and "full_attention" in parameters:
        local = parameters.get("sliding_attention", {}).get("rope_theta", local)
        parameters = parameters["full_attention"]
    if parameters:
        theta = parameters.get("rope_theta", theta)
        rotary = parameters.get("partial_rotary_factor", rotary)
        scaling = parameters
    gemma3 = family == "gemma3_text"
    default = 1_000_000.0 if gemma3 else 10_000.0
    return (
        float(default if theta is None else theta),
        float(10_000.0 if local is None else local) if gemma3 else None,
        _scaling(dict(scaling or {}), raw, where),
        float(1.0 if rotary is None else rotary),
    )


def _scaling(scaling: dict, raw: dict, where: str) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in (None, "default"):
        return None
    maximum = int(raw.get("max_position_embeddings") or 2048)
    original = scaling.get("original_max_position_embeddings")
    original = raw.get("original_max_position_embeddings") if original is None else original
    factor = scaling.get("factor")
    common: dict[str, Any] = {
        "original_max_length": int(maximum if original is None else original),
        "attention_factor": scaling.get("attention_factor"),
    }
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(scaling["factor"]), **common)
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            **common,
        )
    if kind == "yarn":
        if (
            scaling.get("mscale")
            or scaling.get("mscale_all_dim")
            or not scaling.get("truncate", True)
        ):
            raise ValueError(f"{where}: yarn with mscale or truncate=false is not supported")
        return RopeScaling(
            kind="yarn",
            factor=float(factor or maximum / common["original_max_length"]),
            beta_fast=float(scaling.get("beta_fast") or 32),
            beta_slow=float(scaling.get("beta_slow") or 1),
            **common,
        )
    if kind == "longrope":
        return RopeScaling(
            kind="longrope",
            factor=float(factor or maximum / common["original_max_length"]),
            short_factors=tuple(scaling["short_factor"]),
            long_factors=tuple(scaling["long_factor"]),
            **common,
        )
    raise ValueError(f"{where}: unknown rope scaling {kind!r}")


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
      config: of one of the known families.
      dtype: of the stored tensors.

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
        "rope_scaling": _scaling_fields(config),
        "attention_bias": config.output_bias,
    }
    if config.family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if config.rotary_dim is not None:
        raw["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if config.rope_scaling is not None and config.family == "phi3":
        raw["original_max_position_embeddings"] = config.rope_scaling.original_max_length
    windows = [w for w in config.layer_windows if w is not None]
    raw["sliding_window"] = windows[0] if windows else None
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


def _scaling_fields(config: DecoderConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    raw: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind == "factors":
        raise ValueError("config: rope factors from a GGUF file have no Hugging Face form")
    if scaling.kind == "longrope":
        raw |= {
            "type": "longrope",
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
        }
    if scaling.kind != "longrope" or config.family != "phi3":
        raw["factor"] = scaling.factor
    if scaling.kind == "llama3":
        raw |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "yarn":
        raw |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if scaling.attention_factor is not None:
        raw["attention_factor"] = scaling.attention_factor
    if scaling.kind != "linear" and config.family != "phi3":
        raw["original_max_position_embeddings"] = scaling.original_max_length
    return raw
