"""OLMo 2: Llama with norms only after its blocks, and query and key norms over all heads."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from logitjax.models.families import llama

_WEIGHTS = {k: v for k, v in llama.LLAMA.weights.items() if k not in ("attention_norm", "mlp_norm")}


def _gguf_read(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A file with a window is OLMo 3, which has no name of its own in llama.cpp."""
    width, layers = get("attention.sliding_window"), settings["num_layers"]
    if not width:
        return {}
    # Files of earlier converters do not state which layers.
    pattern = get("attention.sliding_window_pattern", [(i + 1) % 4 != 0 for i in range(layers)])
    windows = tuple(int(width) if local else None for local in pattern)
    theta = float(get("rope.freq_base_swa", settings["rope_theta"]))
    return {"windows": windows, "rope_local_theta": theta}


OLMO2 = dataclasses.replace(
    llama.LLAMA,
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    keys=llama.KEYS | dict(
        vocab_size=50_304, hidden_size=4096, intermediate_size=11_008, rms_norm_eps=1e-5,
        max_position_embeddings=2048, attention_bias=False, eos_token_id=50_279, pad_token_id=1,
    ),
    fields={k: v for k, v in llama.LLAMA.fields.items() if k != "mlp_bias"},
    settings=dict(pre_norms=False, post_norms=True, qk_norm=True, qk_norm_joint=True),
    weights=_WEIGHTS | {
        "attention_post_norm": "model.layers.*.post_attention_layernorm",
        "mlp_post_norm": "model.layers.*.post_feedforward_layernorm",
    },
    gguf="olmo2",
    gguf_read=_gguf_read,
    gguf_interleaved=False,
    pre_tokenizers={},
)  # fmt: skip
