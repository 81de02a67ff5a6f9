"""GPT-2: learned positions, layer norms, a plain MLP, and kernels stored input first."""

from collections.abc import Mapping
from typing import Any

from logitjax.models._config import DecoderConfig
from logitjax.models._family import GGUF_WEIGHTS, Family, PreTokenizer
from logitjax.models._hf_fields import Fields


def _read(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    inner = fields.maybe_integer("n_inner") or 4 * settings["hidden_size"]
    scaled = fields.flag("scale_attn_weights")
    return {"intermediate_size": inner, "query_scale": None if scaled else 1.0}


def _write(config: DecoderConfig) -> dict[str, Any]:
    scaled, length = config.query_scale is None, config.max_length
    inner = config.intermediate_size
    return {"n_inner": inner, "n_ctx": length, "scale_attn_weights": scaled}


_QKV = ("attention.query", "attention.key", "attention.value")

GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    keys=dict(
        vocab_size=50_257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, n_inner=None,
        activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
        tie_word_embeddings=True, bos_token_id=50_256, eos_token_id=50_256, pad_token_id=None,
    ),
    fields=dict(
        vocab_size="vocab_size", n_positions="max_length", n_embd="hidden_size",
        n_layer="num_layers", n_head="num_heads", activation_function="activation",
        layer_norm_epsilon="norm_eps", tie_word_embeddings="tie_embeddings",
    ),
    settings=dict(
        gated_mlp=False, norm="layer", position="learned",
        qkv_bias=True, output_bias=True, mlp_bias=True,
    ),
    read=_read,
    write=_write,
    weights={
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
        "attention_norm": "transformer.h.*.ln_1",
        "mlp_norm": "transformer.h.*.ln_2",
        **dict.fromkeys(_QKV, "transformer.h.*.attn.c_attn"),
        "attention.output": "transformer.h.*.attn.c_proj",
        "mlp.up": "transformer.h.*.mlp.c_fc",
        "mlp.down": "transformer.h.*.mlp.c_proj",
    },
    input_first=True,
    free_head_dim=False,
    # transformers accepts these too.
    aliases=dict(
        hidden_size="n_embd", max_position_embeddings="n_positions",
        num_attention_heads="n_head", num_hidden_layers="n_layer",
    ),
    ignored=frozenset({"n_ctx", "n_special", "output_past", "predict_special_tokens"}),
    # Buffers of old checkpoints.
    unread=r".*\.attn\.(masked_)?bias",
    gguf="gpt2",
    gguf_weights=GGUF_WEIGHTS | dict.fromkeys(_QKV, "blk.*.attn_qkv"),
    pre_tokenizers={"default": PreTokenizer(), "gpt-2": PreTokenizer()},
)  # fmt: skip
