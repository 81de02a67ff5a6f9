"""OLMo 3: OLMo 2 with a window on three layers of four, whose rope is never stretched."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.models._config import DecoderConfig
from logitjax.models._hf_fields import Fields, layer_types, windows
from logitjax.models._hf_rope import rope_by_kind
from logitjax.models.families import llama
from logitjax.models.families.olmo2 import OLMO2

_THETA = 500_000.0


def _read(fields: Fields, settings: Mapping[str, Any]) -> dict[str, Any]:
    local = windows(fields, lambda i: (i + 1) % 4 != 0)
    # transformers gives layers with a window this base, regardless of `rope_theta`.
    return {"windows": local, **rope_by_kind(fields, settings, _THETA)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    raw = llama.LLAMA.write(config)
    full = {"rope_type": "default"} | (raw.pop("rope_scaling") or {})
    kinds = {"full_attention": full | {"rope_theta": raw.pop("rope_theta")}}
    local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
    kinds["sliding_attention"] = local
    # If no layer has one, transformers still requires a number there.
    window = raw["sliding_window"] or config.max_length
    types = {"layer_types": layer_types(config), "sliding_window": window}
    return raw | types | {"rope_parameters": kinds}


OLMO3 = dataclasses.replace(
    OLMO2,
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    keys=OLMO2.keys | {"sliding_window": 4096, "rope_theta": _THETA},
    read=_read,
    write=_write,
    # llama.cpp calls it olmo2.
    gguf=None,
)
