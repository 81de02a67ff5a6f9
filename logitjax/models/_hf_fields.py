"""Values of a config.json by key, and keys without effect; others are refused if set."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from logitjax.models._config import DecoderConfig, Window
from logitjax.models._family import NAMES, Family
from logitjax.storage import guard

_HARMLESS = frozenset(NAMES["harmless"])
_ACTIVATIONS: dict[str, str] = NAMES["activations"]
_TYPES = {field.name: field.type for field in dataclasses.fields(DecoderConfig)}


def key_value(config: DecoderConfig, key: str) -> Any:
    """Read a configuration's value at a key that corresponds to one of its fields."""
    name, family = config.traits.fields[key], config.traits
    value = getattr(config, name)
    if name != "activation":
        return value
    # A function with several names gets the family's own, otherwise the most common one.
    spellings = [family.keys[key], "silu", "gelu", "gelu_pytorch_tanh"]
    return next(spelling for spelling in spellings if _ACTIVATIONS[spelling] == value)


def check_readable(raw: Mapping[str, Any], where: str) -> None:
    """Reject by name features that no family computes: layers without attention, packed weights."""
    inner = raw.get("text_config")
    for part in (raw, inner if isinstance(inner, Mapping) else {}):
        kinds = part.get("layer_types")
        # The first files of Qwen3-Next have this form.
        if part.get("full_attention_interval", 1) != 1:
            kinds = ["linear_attention"]
        for kind in kinds if isinstance(kinds, list) else ():
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(
                    f"{where}: layer_types: expected full_attention or sliding_attention, got "
                    f"{guard.short(kind)}: hybrids, such as Qwen3-Next, are not supported"
                )
        for key in ("quantization_config", "compression_config"):
            if packed := part.get(key):
                packed = packed if isinstance(packed, Mapping) else {}
                method = packed.get("quant_method")
                if method == "fp8" and packed.get("weight_block_size") == [128, 128]:
                    # Scales of blocks, which the reader of tensors applies.
                    continue
                raise ValueError(
                    f"{where}: {key}: quantized weights ({guard.short(method or 'unnamed')}) are "
                    "not supported; use the unquantized checkpoint or a GGUF file"
                )


def check_keys(raw: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse an unknown key that might change the mathematics."""
    names = {*family.keys, *family.aliases, *family.ignored, *_HARMLESS}
    for key, value in raw.items():
        if key in names or key.startswith("_"):
            continue
        # A switch that is off, or an empty value.
        if value in (None, False, 0, "", [], {}):
            continue
        if key in family.ignored_at and value == family.ignored_at[key]:
            continue
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ValueError(
            f"{where}: {key}={shown} is unknown for {family.name} and may change its logits; "
            "remove the key if it does not"
        )


class Fields:
    """Values of a config.json by key, or transformers' default; of the right type, or an error."""

    def __init__(self, raw: Mapping[str, Any], family: Family, where: str):
        self.raw = {family.aliases.get(key, key): value for key, value in raw.items()}
        self.family, self.where = family.name, where
        self._defaults = family.keys

    def __getitem__(self, key: str) -> Any:
        return self.raw.get(key, self._defaults[key]) if key in self._defaults else None

    def wrong(self, key: str, expected: str) -> ValueError:
        return ValueError(f"{self.where}: {key}: expected {expected}, got {guard.short(self[key])}")

    def integer(self, key: str, least: int = 1) -> int:
        value = self.number(key)
        # A billion layers would make a list of a billion entries before any weight is missed.
        most = guard.LIMITS.layers if "layer" in key else guard.LIMITS.width
        if not least <= value <= most or value != int(value):
            raise self.wrong(key, f"an integer from {least} to {most}")
        return int(value)

    def number(self, key: str) -> float:
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        return value

    def maybe_integer(self, key: str) -> int | None:
        return None if self[key] is None else self.integer(key)

    def maybe_number(self, key: str) -> float | None:
        return None if self[key] is None else float(self.number(key))

    def flag(self, key: str) -> bool:
        # transformers treats None and 0 as false.
        if self[key] not in (True, False, None):
            raise self.wrong(key, "true or false")
        return bool(self[key])

    def mapping(self, key: str) -> dict[str, Any]:
        value = self[key]
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return dict(value or {})

    def value(self, key: str, name: str) -> Any:
        optional = name in ("num_kv_heads", "head_dim")
        readers = {
            int: self.maybe_integer if optional else self.integer,
            bool: self.flag,
            float: lambda key: float(self.number(key)),
            float | None: self.maybe_number,
        }
        return readers.get(_TYPES[name], self.activation)(key)

    def activation(self, key: str) -> str:
        name = self[key]
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise self.wrong(key, f"one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def tokens(self, key: str) -> tuple[int, ...]:
        ids, size = self[key], self.integer("vocab_size")
        ids = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.wrong(key, "ids of tokens")
        # Old files often have -1, and defaults may lie outside a small vocabulary.
        return tuple(i for i in ids if 0 <= i < size)


def windows(
    fields: Fields,
    is_local: Callable[[int], bool] | None = None,
    *,
    off: bool = False,
    heeds_types: bool = True,
) -> tuple[Window, ...]:
    """The window of each layer, by `layer_types` if given, else by `is_local`, else one for all.

    If transformers ignores `layer_types`, which other programs use, they must match the rule.
    """
    layers, kinds = fields.integer("num_hidden_layers"), fields["layer_types"]
    if kinds is not None and (
        len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}
    ):
        raise ValueError(
            f"{fields.where}: layer_types: expected full_attention or sliding_attention "
            f"for each of {layers} layers"
        )
    window = None if off else fields["sliding_window"]
    sliding = [kind == "sliding_attention" for kind in kinds or ()]
    if kinds is not None and heeds_types:
        local = sliding
    else:
        local = [window is not None if is_local is None else is_local(i) for i in range(layers)]
        if kinds is not None and local != sliding:
            raise ValueError(
                f"{fields.where}: layer_types: expected those that sliding_window={window!r} "
                f"implies for {fields.family}, got {sorted(set(kinds))}"
            )
    if not any(local):
        return ()
    if window is None:
        raise fields.wrong("sliding_window", "a number for the layers of sliding_attention")
    width = fields.integer("sliding_window")
    return tuple(width if one else None for one in local)


def layer_types(config: DecoderConfig) -> list[str]:
    """The kind of each layer, for families whose layers differ."""
    return ["full_attention" if w is None else "sliding_attention" for w in config.layer_windows]
