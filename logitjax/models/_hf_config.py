"""Reading and writing config.json of Hugging Face."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from logitjax.models._config import DecoderConfig
from logitjax.models._families import find_family
from logitjax.models._hf_fields import Fields, check_keys, check_readable, key_value


def config_from_hf(raw: Mapping[str, Any], *, where: str = "config.json") -> DecoderConfig:
    """The configuration that a Hugging Face `config.json` describes.

    Missing keys have transformers' defaults. A key that is neither read nor known to have no effect
    is refused, unless it is off.

    Args:
        raw: the parsed file. For a multimodal one, such as Gemma 3's, the text part is used.
        where: its name in errors.

    Raises:
        ValueError: for an unknown family, key or setting, or a value of the wrong type.

    >>> config_from_hf({"model_type": "gpt2", "vocab_size": 10, "n_embd": 8, "n_layer": 1,
    ...                 "n_head": 2, "n_positions": 16}).position
    'learned'
    """
    kind = raw.get("model_type", raw.get("architectures"))
    check_readable(raw, where)
    family = find_family(kind, f"{where}: model_type", lambda f: (f.name, f.wrapper), raw)
    check_keys(raw, family, where)
    if kind == family.wrapper:
        # Token ids stand beside the two halves; older files have all settings there.
        inner = raw.get("text_config")
        text = dict(inner) if isinstance(inner, Mapping) else {}
        raw = text | {k: v for k, v in raw.items() if v is not None and k.endswith("token_id")}
        check_keys(raw, family, where)
    fields = Fields(raw, family, where)
    settings: dict[str, Any] = {
        name: fields.value(key, name) for key, name in family.fields.items()
    }
    # Values that follow from the others if they are not stated.
    heads = settings["num_heads"]
    settings["num_kv_heads"] = settings.get("num_kv_heads") or heads
    settings["head_dim"] = settings.get("head_dim") or settings["hidden_size"] // heads
    settings.setdefault("qkv_bias", settings.get("output_bias", False))
    settings |= family.read(fields, settings)
    bos, pad = fields.tokens("bos_token_id"), fields.tokens("pad_token_id")
    settings |= {"bos_id": next(iter(bos), None), "pad_id": next(iter(pad), None)}
    settings["eos_ids"] = fields.tokens("eos_token_id")
    return DecoderConfig(family=family.name, **settings | family.settings)


def config_to_hf(config: DecoderConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a configuration, as transformers and vLLM read it."""
    family = config.traits
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos,
        "pad_token_id": config.pad_id,
        "torch_dtype": dtype,
    }
    written = {key: key_value(config, key) for key in family.fields} | family.write(config)
    raw |= {k: v for k, v in written.items() if k in family.keys or k in family.ignored}
    # Read back: settings that the format cannot express come back as something else.
    expected, loaded = dataclasses.replace(config, segment_boundaries=()), config_from_hf(raw)
    if wrong := [f for f in vars(expected) if getattr(expected, f) != getattr(loaded, f)]:
        raise ValueError(
            f"config: the Hugging Face format of {config.family} cannot express "
            + ", ".join(f"{f}={getattr(expected, f)!r}" for f in wrong)
        )
    return raw
