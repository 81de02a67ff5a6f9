"""Rotary settings of a config.json, in the forms of both generations of transformers."""

import math
from collections.abc import Mapping
from typing import Any

from logitjax.models._config import DecoderConfig, RopeScaling
from logitjax.models._hf_fields import Fields

# Keys of every kind of scaling. `finetuned` is a note of some publishers.
_ANY = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
_ANY |= {"original_max_position_embeddings"}
# For each kind the keys to write, and their fields of a `RopeScaling`.
_LENGTH = {"original_max_position_embeddings": "original_max_length"}
_WRITTEN: dict[str, dict[str, str]] = {
    "linear": {},
    "llama3": _LENGTH | {n: n for n in ("low_freq_factor", "high_freq_factor")},
    "yarn": _LENGTH | {"beta_fast": "beta_fast", "beta_slow": "beta_slow"},
    "longrope": _LENGTH
    | {"type": "kind", "short_factor": "short_factors", "long_factor": "long_factors"},
}

# Keys that are read in addition to `factor` and the written ones.
_MORE = {
    "yarn": {"attention_factor", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"attention_factor"},
}


def scaling_of(fields: Fields) -> dict[str, Any]:
    """Return a single-rope family's scaling: `rope_scaling` wins over the newer key."""
    parameters = fields.mapping("rope_parameters")
    if {"full_attention", "sliding_attention"} & set(parameters):
        raise fields.wrong("rope_parameters", "one object for all layers")
    return fields.mapping("rope_scaling") or parameters


def rope_settings(
    fields: Fields,
    settings: Mapping[str, Any],
    scaling: Mapping[str, Any] | None = None,
    *,
    partial: bool = False,
) -> dict[str, Any]:
    """Base, scaling (`scaling_of` by default; wins over adjacent keys) and rotated dimensions."""
    scaling = scaling_of(fields) if scaling is None else scaling
    kind, head_dim = scaling_kind(scaling), settings["head_dim"]
    theta = rope_number(scaling, "rope_theta", fields, fields["rope_theta"])
    share = scaling.get("partial_rotary_factor", fields["partial_rotary_factor"])
    share = 1.0 if share is None else share
    if share != 1.0 and not partial:
        raise ValueError(
            f"{fields.where}: partial_rotary_factor: {fields.family} rotates whole heads, "
            f"got {share!r}"
        )
    rotary = int(head_dim * share)
    if rotary < 2 or rotary % 2:
        raise ValueError(
            f"{fields.where}: head_dim: expected an even number of rotated dimensions, "
            f"got {rotary} of {head_dim}"
        )
    return {
        "rope_theta": theta,
        "rope_scaling": _scaling(scaling, kind, fields, rotary),
        "rotary_dim": None if rotary == head_dim else rotary,
    }


def rope_by_kind(fields: Fields, settings: Mapping[str, Any], local: Any) -> dict[str, Any]:
    """`rope_settings` if layers with a window rotate unscaled, with a base of their own."""
    scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if parameters and not {"full_attention", "sliding_attention"} & set(parameters):
        raise fields.wrong("rope_parameters", "an object for each kind of layer")
    inner = dict(parameters.get("sliding_attention") or {})
    if scaling_kind(inner) != "default":
        raise fields.wrong("rope_parameters", "no scaling of layers with a window")
    if "type" in scaling and "rope_type" not in scaling:
        # transformers treats it as no scaling at all.
        raise fields.wrong("rope_scaling", "its kind under the name rope_type")
    check_scaling(inner, "default", fields)
    full = dict(parameters.get("full_attention") or {}) | scaling
    if full.get("rope_type") == "default":
        # transformers merges the two as well; leftovers of another kind change nothing.
        full = {key: value for key, value in full.items() if key in _ANY}
    theta = rope_number(inner, "rope_theta", fields, local)
    return rope_settings(fields, settings, full) | {"rope_local_theta": theta}


def scaling_kind(scaling: Mapping[str, Any]) -> str:
    return scaling.get("rope_type") or scaling.get("type") or "default"


def check_scaling(scaling: Mapping[str, Any], kind: str, fields: Fields) -> None:
    kinds = ("default", *_WRITTEN)
    if kind not in kinds:
        raise ValueError(
            f"{fields.where}: unknown rope scaling {kind!r}, expected one of {', '.join(kinds)}"
        )
    existing = _ANY | _WRITTEN.get(kind, {}).keys() | _MORE.get(kind, set())
    existing |= set() if kind == "default" else {"factor"}
    for key, value in scaling.items():
        if key not in existing and value not in (None, False, 0, []):
            raise ValueError(f"{fields.where}: rope scaling {kind} has no key {key!r}")


def rope_number(scaling: Mapping[str, Any], key: str, fields: Fields, default: Any = None) -> float:
    value, kind = scaling.get(key, default), scaling_kind(scaling)
    if isinstance(value, bool) or not isinstance(value, int | float):
        name = "rope" if kind == "default" else f"rope scaling {kind}"
        raise ValueError(f"{fields.where}: {name} needs a number {key}, got {value!r}")
    return float(value)


def _scaling(
    scaling: Mapping[str, Any], kind: str, fields: Fields, rotary: int
) -> RopeScaling | None:
    check_scaling(scaling, kind, fields)
    if kind == "default":
        return None
    settings: dict[str, Any] = {"kind": kind}
    # Omitted it is an error for yarn; a null is derived from the lengths.
    follows = kind == "longrope" or (kind == "yarn" and "factor" in scaling)
    if not follows or scaling.get("factor") is not None:
        settings["factor"] = rope_number(scaling, "factor", fields)
    if kind != "linear":
        longest = fields.integer("max_position_embeddings")
        # Keys beside the scaling take precedence over keys in it.
        original = fields.maybe_integer("original_max_position_embeddings")
        if original is None:
            inner = rope_number(scaling, "original_max_position_embeddings", fields, longest)
            original = int(inner)
        settings = {"factor": longest / original, "original_max_length": original} | settings
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            settings[name] = rope_number(scaling, name, fields)
    if kind in ("yarn", "longrope"):
        settings["attention_factor"] = scaling.get("attention_factor")
    if kind == "yarn":
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if settings["attention_factor"] is None and mscale and all_dim:
            ratio = _mscale(settings["factor"], mscale) / _mscale(settings["factor"], all_dim)
            settings["attention_factor"] = ratio
        settings["beta_fast"] = float(scaling.get("beta_fast") or 32)
        settings["beta_slow"] = float(scaling.get("beta_slow") or 1)
        settings["truncate"] = bool(scaling.get("truncate", True))
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        values = scaling.get(name)
        values = values if isinstance(values, list | tuple) else []
        numbers = all(isinstance(v, int | float) for v in values)
        if not numbers or len(values) != rotary // 2:
            raise ValueError(
                f"{fields.where}: rope scaling longrope needs {rotary // 2} numbers {name}"
            )
        settings[f"{name}s"] = tuple(map(float, values))
    return RopeScaling(**settings)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def scaling_fields(config: DecoderConfig) -> dict[str, Any] | None:
    """The `rope_scaling` of a configuration, in the form that all versions read."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    raw: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    raw |= {key: getattr(scaling, name) for key, name in _WRITTEN[scaling.kind].items()}
    if not scaling.truncate:
        raw["truncate"] = False
    if scaling.attention_factor is not None:
        raw["attention_factor"] = scaling.attention_factor
    return raw
