"""Gemma 3's text model: Gemma 2 with query and key norms, two rope bases and other windows."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from logitjax.models._config import DecoderConfig
from logitjax.models._hf_fields import Fields, windows
from logitjax.models._hf_rope import rope_by_kind
from logitjax.models.families.gemma2 import GEMMA2, _gguf_gemma, _scales


def _read(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    period = fields.integer("sliding_window_pattern")
    return {
        "windows": windows(fields, lambda i: (i + 1) % period != 0),
        **rope_by_kind(fields, settings, fields["rope_local_base_freq"]),
        **_scales(fields, settings),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    return GEMMA2.write(config) | {"rope_local_base_freq": config.rope_local_theta}


def _gguf_read(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    local = float(get("rope.freq_base_swa", 10_000.0))
    shared = _gguf_gemma(get, settings, period=6, window=1024, largest=62)
    return shared | {"rope_local_theta": local}


GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    # transformers ignores attn_logit_softcapping here.
    keys={k: v for k, v in GEMMA2.keys.items() if k != "attn_logit_softcapping"} | dict(
        vocab_size=262_208, max_position_embeddings=131_072, rope_theta=1_000_000.0,
        rope_local_base_freq=10_000.0, sliding_window_pattern=6, final_logit_softcapping=None,
    ),
    settings=GEMMA2.settings | {"qk_norm": True},
    read=_read,
    write=_write,
    wrapper="gemma3",
    ignored=frozenset({
        "hidden_act",
        # Keys of the vision part, which is not read.
        "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index", "image_token_id",
        "image_token_index", "mm_tokens_per_image", "text_config", "vision_config",
    }),
    # The vision part, by the names of both generations of transformers.
    unread=rf"{GEMMA2.unread}|(model\.)?(vision_tower|multi_modal_projector)\..*",
    gguf="gemma3",
    gguf_read=_gguf_read,
)  # fmt: skip
