"""Rotary settings of a config.json, in the forms of both generations of transformers."""

import math
from collections.abc import Mapping
from typing import Any

from logitjax.models._config import DecoderConfig, RopeScaling
from logitjax.models._hf_fields import Fields

# Keys of every kind of scaling, and what each adds. `finetuned` is a note of some publishers.
_ANY = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
_ANY |= {"original_max_position_embeddings"}
_KNOWN: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate",
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}  # fmt: skip


def rope_settings(fields: Fields, family: str, head_dim: int) -> dict[str, Any]:
    """Base, base of layers with a window, scaling and rotated dimensions, as `DecoderConfig` has.

    `rope_scaling` wins over `rope_parameters`, and what either says over the keys beside them.

    Raises:
        ValueError: A kind of scaling or a key of it that is not known, or one that is missing.
    """
    given, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    local = None
    if family == "gemma3_text":
        if parameters and not {"full_attention", "sliding_attention"} & set(parameters):
            raise fields.wrong("rope_parameters", "an object for each kind of layer")
        inner = dict(parameters.get("sliding_attention") or {})
        if _kind(inner) != "default":
            raise fields.wrong("rope_parameters", "no scaling of layers with a window")
        _check(inner, "default", fields)
        if "type" in given and "rope_type" not in given:
            # transformers takes it for no scaling at all.
            raise fields.wrong("rope_scaling", "its kind under the name rope_type")
        local = _number(inner, "rope_theta", fields, fields["rope_local_base_freq"])
        given = dict(parameters.get("full_attention") or {}) | given
    elif {"full_attention", "sliding_attention"} & set(parameters):
        raise fields.wrong("rope_parameters", "one object for all layers")
    scaling = given or parameters
    kind = _kind(scaling)
    if family == "phi3" and kind in ("su", "yarn"):  # Names of longrope in early configurations.
        kind = "longrope"
    if family == "phi3" and kind not in ("default", "longrope"):
        raise ValueError(f"{fields.where}: rope scaling: phi3 has longrope only, got {kind!r}")
    theta = _number(scaling, "rope_theta", fields, fields["rope_theta"])
    share = scaling.get("partial_rotary_factor", fields["partial_rotary_factor"])
    share = 1.0 if share is None else share
    if share != 1.0 and family != "phi3":
        raise ValueError(
            f"{fields.where}: partial_rotary_factor: {family} rotates whole heads, got {share!r}"
        )
    rotary = int(head_dim * share)
    if rotary < 2 or rotary % 2:
        raise ValueError(
            f"{fields.where}: head_dim: expected an even number of rotated dimensions, "
            f"got {rotary} of {head_dim}"
        )
    return {
        "rope_theta": theta,
        "rope_local_theta": local,
        "rope_scaling": _scaling(scaling, kind, fields, rotary),
        "rotary_dim": None if rotary == head_dim else rotary,
    }


def _kind(scaling: Mapping[str, Any]) -> str:
    return scaling.get("rope_type") or scaling.get("type") or "default"


def _check(scaling: Mapping[str, Any], kind: str, fields: Fields) -> None:
    if kind not in _KNOWN:
        raise ValueError(
            f"{fields.where}: unknown rope scaling {kind!r}, "
            f"expected one of {', '.join(sorted(_KNOWN))}"
        )
    for key, value in scaling.items():
        if key not in _KNOWN[kind] | _ANY and value not in (None, False, 0, []):
            raise ValueError(f"{fields.where}: rope scaling {kind} has no key {key!r}")


def _number(scaling: Mapping[str, Any], key: str, fields: Fields, default: Any = None) -> float:
    value = scaling.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        name = f"rope scaling {_kind(scaling)}" if _kind(scaling) != "default" else "rope"
        raise ValueError(f"{fields.where}: {name} needs a number {key}, got {value!r}")
    return float(value)


def _scaling(scaling: dict, kind: str, fields: Fields, rotary: int) -> RopeScaling | None:
    _check(scaling, kind, fields)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=_number(scaling, "factor", fields))
    longest = fields.integer("max_position_embeddings")
    # What stands beside the scaling wins over what stands in it.
    original = fields.maybe_integer("original_max_position_embeddings")
    if original is None:
        original = int(_number(scaling, "original_max_position_embeddings", fields, longest))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=_number(scaling, "factor", fields),
            low_freq_factor=_number(scaling, "low_freq_factor", fields),
            high_freq_factor=_number(scaling, "high_freq_factor", fields),
            original_max_length=original,
        )
    # Left out it is an error of yarn's; said to be nothing it follows from the lengths.
    factor = scaling.get("factor") if kind == "longrope" or "factor" in scaling else ...
    if factor is None:
        factor = longest / original
    else:
        factor = _number(scaling, "factor", fields)
    attention = scaling.get("attention_factor")
    if kind == "yarn":
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if attention is None and mscale and all_dim:
            attention = _mscale(factor, mscale) / _mscale(factor, all_dim)
        return RopeScaling(
            kind="yarn",
            factor=factor,
            beta_fast=float(scaling.get("beta_fast") or 32),
            beta_slow=float(scaling.get("beta_slow") or 1),
            truncate=bool(scaling.get("truncate", True)),
            attention_factor=attention,
            original_max_length=original,
        )
    factors = {}
    for name in ("short_factor", "long_factor"):
        values = scaling.get(name)
        values = values if isinstance(values, list) else []
        numbers = all(isinstance(v, int | float) for v in values)
        if not numbers or len(values) != rotary // 2:
            raise ValueError(
                f"{fields.where}: rope scaling longrope needs {rotary // 2} numbers {name}"
            )
        factors[name] = tuple(map(float, values))
    return RopeScaling(
        kind="longrope",
        factor=factor,
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
        attention_factor=attention,
        original_max_length=original,
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def scaling_fields(config: DecoderConfig) -> dict[str, Any] | None:
    """The `rope_scaling` of a configuration, in the form that all versions read.

    Raises:
        ValueError: Factors of a GGUF file, which Hugging Face's format cannot say.
    """
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
    # The first readers of Phi-3 take no other keys.
    if config.family != "phi3" or scaling.factor != config.max_length / scaling.original_max_length:
        raw["factor"] = scaling.factor
    if scaling.kind == "llama3":
        raw |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "yarn":
        raw |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if not scaling.truncate:
            raw["truncate"] = False
    if scaling.attention_factor is not None:
        raw["attention_factor"] = scaling.attention_factor
    if scaling.kind != "linear" and config.family != "phi3":
        raw["original_max_position_embeddings"] = scaling.original_max_length
    return raw
