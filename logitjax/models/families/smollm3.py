"""SmolLM3: Llama with layers that have no positions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from logitjax.models._config import DecoderConfig
from logitjax.models._hf_fields import Fields, layer_types, windows
from logitjax.models._hf_rope import rope_settings
from logitjax.models.families import llama


def _read(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    layers, rotates = settings["num_layers"], fields["no_rope_layers"]
    if rotates is None:
        period = fields.integer("no_rope_layer_interval")
        rotates = [(i + 1) % period != 0 for i in range(layers)]
    if not isinstance(rotates, list) or len(rotates) != layers:
        raise fields.wrong("no_rope_layers", f"0 or 1 for each of {layers} layers")
    unrotated = tuple(i for i, one in enumerate(rotates) if not one)
    windowed = fields.flag("use_sliding_window") and fields["sliding_window"] is not None
    local = windows(fields, lambda i: windowed and i in unrotated)
    return {"windows": local, "unrotated": unrotated, **rope_settings(fields, settings)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    rotates = [int(i not in config.unrotated) for i in range(config.num_layers)]
    types = {"layer_types": layer_types(config), "use_sliding_window": bool(config.windows)}
    return llama.LLAMA.write(config) | types | {"no_rope_layers": rotates}


def _gguf_read(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    # No metadata state it: llama.cpp assumes every fourth layer.
    return {"unrotated": tuple(range(3, settings["num_layers"], 4))}


SMOLLM3 = dataclasses.replace(
    llama.LLAMA,
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    keys=llama.LLAMA.keys | dict(
        vocab_size=128_256, hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=32_768, rope_theta=2_000_000.0,
        tie_word_embeddings=True, use_sliding_window=False, sliding_window=None,
        no_rope_layers=None, no_rope_layer_interval=4,
        bos_token_id=128_000, eos_token_id=128_001, pad_token_id=128_004,
    ),
    read=_read,
    write=_write,
    ignored=frozenset({"max_window_layers"}),
    gguf="smollm3",
    gguf_read=_gguf_read,
    pre_tokenizers={},
)  # fmt: skip
