"""The decoder configuration in the metadata of a GGUF file."""

import math
from typing import Any

from logitjax.models._config import DecoderConfig, RopeScaling
from logitjax.models._families import find_family
from logitjax.models._gguf import GgufSource
from logitjax.models._hf_fields import Fields
from logitjax.storage import guard

# Tokens that end a turn, as chat models of several families spell them.
_TURN_ENDS = frozenset({"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"})


def gguf_config(source: GgufSource) -> DecoderConfig:
    architecture = source.metadata("general.architecture")
    where = f"{source.path}: general.architecture"
    # Mixtral's files have the architecture of Llama.
    mixed = "+experts" if source.metadata(f"{architecture}.expert_count") else ""
    name = f"{architecture}{mixed}" if isinstance(architecture, str) else architecture
    family = find_family(name, where, lambda f: (f.gguf,))

    def get(key: str, default: Any = None) -> Any:
        return source.metadata(f"{architecture}.{key}", default)

    def need(key: str) -> Any:
        value = get(key)
        if value is None:
            raise ValueError(f"{source.path}: metadata {architecture}.{key} is missing")
        return value

    def size(key: str, default: int | None = None) -> int:
        value = need(key) if default is None else get(key, default)
        most = guard.LIMITS.layers if key == "block_count" else guard.LIMITS.width
        return guard.whole(
            value, f"{source.path}: metadata {architecture}.{key}", least=1, most=most
        )

    names = source.names()
    embedding = f"{family.gguf_weights['embedding']}.weight"
    if embedding not in names:
        raise ValueError(f"{source.path}: tensor {embedding!r} is missing")

    def has_tensor(module: str, leaf: str = "bias") -> bool:
        return f"{family.gguf_weights[module]}.{leaf}".replace("*", "0") in names

    hidden, heads, layers = map(size, ("embedding_length", "attention.head_count", "block_count"))
    ends = [source.metadata(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    # As in llama.cpp: files of chat models often name only the end-of-text token.
    tokens = source.metadata("tokenizer.ggml.tokens") or ()
    types = source.metadata("tokenizer.ggml.token_type") or ()
    ends += [i for i, (t, kind) in enumerate(zip(tokens, types)) if kind == 3 and t in _TURN_ENDS]
    head_dim = size("attention.key_length", hidden // heads)
    activation = next(key for key, name in family.fields.items() if name == "activation")
    common: dict[str, Any] = {
        "vocab_size": source.shape(embedding)[0],
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "family": family.name,
        "max_length": size("context_length"),
        "rope_theta": float(get("rope.freq_base", 10_000.0)),
        "rope_scaling": _rope_scaling(source, get),
        "tie_embeddings": not has_tensor("head", "weight"),
        "bos_id": source.metadata("tokenizer.ggml.bos_token_id"),
        "eos_ids": tuple(dict.fromkeys(int(id) for id in ends if id is not None)),
        "pad_id": source.metadata("tokenizer.ggml.padding_token_id"),
        "qkv_bias": has_tensor("attention.query"),
        "output_bias": has_tensor("attention.output"),
        "mlp_bias": has_tensor("mlp.up") if not mixed else False,
        # No metadata state it: the usual value if a config.json does not either.
        "activation": Fields({}, family, where).activation(activation),
    }
    rotary = size("rope.dimension_count", head_dim)
    if rotary != head_dim:
        common["rotary_dim"] = rotary
    common |= family.gguf_read(get, common) | family.settings
    epsilon = "layer_norm_epsilon" if common.get("norm") == "layer" else "layer_norm_rms_epsilon"
    return DecoderConfig(norm_eps=float(need(f"attention.{epsilon}")), **common)


def _rope_scaling(source: GgufSource, get: Any) -> RopeScaling | None:
    if "rope_freqs.weight" in source.names():
        # llama.cpp stores Llama 3's scaling as the resulting factors, the same for all lengths.
        factors = tuple(float(f) for f in source.read("rope_freqs.weight"))
        same: Any = {"attention_factor": 1.0, "original_max_length": int(get("context_length"))}
        return RopeScaling(kind="longrope", short_factors=factors, long_factors=factors, **same)
    if "rope_factors_short.weight" in source.names():
        short, long = (
            tuple(float(f) for f in source.read(f"rope_factors_{n}.weight"))
            for n in ("short", "long")
        )
        original = int(get("rope.scaling.original_context_length", get("context_length")))
        return RopeScaling(
            kind="longrope",
            factor=int(get("context_length")) / original,
            original_max_length=original,
            attention_factor=get("rope.scaling.attn_factor"),
            short_factors=short,
            long_factors=long,
        )
    kind = get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{source.path}: unknown rope scaling {kind!r}")
    factor = float(get("rope.scaling.factor", 1.0))
    # llama.cpp multiplies it by YaRN's own amplitude, the only factor if the file states none.
    scale = get("rope.scaling.yarn_attn_factor", get("rope.scaling.attn_factor"))
    amplitude = 1.0 + 0.1 * math.log(max(factor, 1.0))
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_max_length=int(get("rope.scaling.original_context_length", get("context_length"))),
        beta_fast=float(get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=float(get("rope.scaling.yarn_beta_slow", 1.0)),
        attention_factor=float(scale) * amplitude if scale and kind == "yarn" else None,
    )
