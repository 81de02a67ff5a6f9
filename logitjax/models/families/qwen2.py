"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values, and windows on late layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.models._config import DecoderConfig
from logitjax.models._family import PreTokenizer
from logitjax.models._hf_fields import Fields, layer_types, windows
from logitjax.models._hf_rope import rope_settings
from logitjax.models.families import llama


def _read(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    on = fields.flag("use_sliding_window")

    def is_local(layer: int) -> bool:
        first = fields.integer("max_window_layers", least=0)
        return on and fields["sliding_window"] is not None and layer >= first

    layer_windows = windows(fields, is_local, off=not on)
    return {"windows": layer_windows, **rope_settings(fields, settings)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    count = sum(window is not None for window in config.layer_windows)
    switches = {"use_sliding_window": count > 0, "max_window_layers": config.num_layers - count}
    types = {"layer_types": layer_types(config)} if count else {}
    return llama.LLAMA.write(config) | switches | types


QWEN2 = dataclasses.replace(
    llama.LLAMA,
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=llama.KEYS | dict(
        vocab_size=151_936, hidden_size=4096, intermediate_size=22_016, num_key_value_heads=32,
        max_position_embeddings=32_768,
        use_sliding_window=False, sliding_window=4096, max_window_layers=28,
    ),
    settings={"qkv_bias": True},
    read=_read,
    write=_write,
    # Parameters decide: an extra or missing bias is an error when tensors are read.
    ignored=frozenset({"attention_bias"}),
    gguf="qwen2",
    gguf_interleaved=False,
    pre_tokenizers={
        "qwen2": PreTokenizer(pattern=llama.PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"), nfc=True)
    },
)  # fmt: skip
