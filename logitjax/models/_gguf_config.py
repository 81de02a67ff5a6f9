"""The decoder that the metadata of a GGUF file describes."""

from typing import Any

from logitjax.models._config import DecoderConfig, RopeScaling
from logitjax.models._gguf import GgufSource
from logitjax.storage import guard

# Tokens that end a turn, as chat models of several families spell them.
_TURN_ENDS = frozenset({"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"})

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2")


def gguf_config(source: GgufSource) -> tuple[DecoderConfig, str]:
    """The decoder that a GGUF file describes, and its architecture's name."""
    architecture = source.metadata("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{source.path}: unknown architecture {architecture!r}, "
            f"expected one of {', '.join(ARCHITECTURES)}"
        )

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
    if "token_embd.weight" not in names:
        raise ValueError(f"{source.path}: tensor 'token_embd.weight' is missing")
    vocab_size = source.shape("token_embd.weight")[0]
    hidden, heads, layers = map(size, ("embedding_length", "attention.head_count", "block_count"))
    epsilon = "layer_norm_epsilon" if architecture == "gpt2" else "layer_norm_rms_epsilon"
    ends = [source.metadata(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    # As llama.cpp does: files of chat models often name the end of a text alone.
    tokens = source.metadata("tokenizer.ggml.tokens") or ()
    types = source.metadata("tokenizer.ggml.token_type") or ()
    ends += [i for i, (t, kind) in enumerate(zip(tokens, types)) if kind == 3 and t in _TURN_ENDS]
    head_dim = size("attention.key_length", hidden // heads)
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "family": "gemma3_text" if architecture == "gemma3" else architecture,
        "max_length": size("context_length"),
        "norm_eps": float(need(f"attention.{epsilon}")),
        "rope_theta": float(get("rope.freq_base", 10_000.0)),
        "rope_scaling": _rope_scaling(source, get),
        "tie_embeddings": "output.weight" not in names,
        "bos_id": source.metadata("tokenizer.ggml.bos_token_id"),
        "eos_ids": tuple(dict.fromkeys(int(id) for id in ends if id is not None)),
        "pad_id": source.metadata("tokenizer.ggml.padding_token_id"),
        "qkv_bias": "blk.0.attn_q.bias" in names or "blk.0.attn_qkv.bias" in names,
        "output_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "qk_norm": "blk.0.attn_q_norm.weight" in names,
    }
    rotary = size("rope.dimension_count", head_dim)
    if rotary != head_dim:
        common["rotary_dim"] = rotary
    window = get("attention.sliding_window")
    return DecoderConfig(**common | _family_settings(common, get, window)), architecture


def _family_settings(common: dict, get: Any, window: int | None) -> dict[str, Any]:
    layers, hidden = common["num_layers"], common["hidden_size"]
    family = common["family"]
    if family in ("gemma2", "gemma3_text"):
        period = 2 if family == "gemma2" else 6
        window = int(window or (4096 if family == "gemma2" else 1024))
        out: dict[str, Any] = {
            "activation": "gelu_tanh",
            "norm_offset": 1.0,
            "post_norms": True,
            "embedding_scale": hidden**0.5,
            "query_scale": common["head_dim"] ** -0.5,
            "windows": tuple(None if (i + 1) % period == 0 else window for i in range(layers)),
        }
        if family == "gemma2":
            out["attention_softcap"] = float(get("attn_logit_softcapping", 50.0))
            out["logits_softcap"] = float(get("final_logit_softcapping", 30.0))
            # The 27B model alone scales queries by hidden_size / num_heads, as llama.cpp does.
            if layers == 46:
                out["query_scale"] = (hidden / common["num_heads"]) ** -0.5
        else:
            out["rope_local_theta"] = float(get("rope.freq_base_swa", 10_000.0))
            if layers == 62:
                out["query_scale"] = (hidden / common["num_heads"]) ** -0.5
        return out
    if family == "gpt2":
        return {
            "activation": "gelu_tanh",
            "gated_mlp": False,
            "norm": "layer",
            "position": "learned",
        }
    if window:
        return {"windows": (int(window),) * layers}
    return {}


def _rope_scaling(source: GgufSource, get: Any) -> RopeScaling | None:
    if "rope_freqs.weight" in source.names():
        factors = tuple(float(f) for f in source.read("rope_freqs.weight"))
        return RopeScaling(kind="factors", short_factors=factors)
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
    return RopeScaling(
        kind=kind,
        factor=float(get("rope.scaling.factor", 1.0)),
        original_max_length=int(get("rope.scaling.original_context_length", 8192)),
    )


def is_rope_tensor(name: str) -> bool:
    """Tensors that the configuration absorbs."""
    return name.startswith(("rope_freqs", "rope_factors_"))
