"""Fusion strategies as written in flags."""

import ast
import dataclasses
import re
from typing import Any

from logitjax import fusion

STRATEGIES: dict[str, type] = {
    "cfg": fusion.Guidance,
    "context_aware": fusion.Guidance,
    "contrastive": fusion.ContrastiveDecoding,
    "dexperts": fusion.DExperts,
    "dynamic": fusion.DynamicFusion,
    "logit_difference": fusion.LogitDifference,
    "proxy": fusion.ProxyTuning,
}
# The parts between commas, except commas in brackets.
_SETTING = re.compile(r"(?:\([^)]*\)|\[[^\]]*\]|[^,])+")


def strategy(spec: str | None) -> Any:
    """A fusion strategy from `name` or `name:field=value,...`; None from None.

    >>> strategy("dynamic:method=grid,num=11").num
    11

    Raises:
        ValueError: There is no such strategy or field, or the value is not a number.
    """
    if spec is None:
        return None
    name, _, settings = spec.partition(":")
    if name not in STRATEGIES:
        raise ValueError(f"fusion: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    fields = {field.name: field.default for field in dataclasses.fields(STRATEGIES[name])}
    arguments = {}
    for setting in _SETTING.findall(settings):
        key, equals, value = setting.partition("=")
        if not equals or key not in fields:
            raise ValueError(
                f"fusion: {name} takes {', '.join(sorted(fields))} as key=value, got {setting!r}"
            )
        arguments[key] = _value(f"{name}:{key}", value, fields[key])
    return STRATEGIES[name](**arguments)


def _value(name: str, text: str, default: Any) -> Any:
    """The value of a setting, of the same kind as its default; strategies check texts."""
    try:
        # Numbers, tuples and booleans in Python syntax; nothing is executed.
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    kinds = {
        int: (int, "a whole number"),
        float: (int | float, "a number"),
        tuple: (tuple | list, "numbers in brackets"),
    }
    kind, words = kinds.get(type(default), (object, ""))
    if not isinstance(value, kind) or (kind is not object and isinstance(value, bool)):
        raise ValueError(f"fusion: {name}: expected {words}, got {text!r}")
    # Strategies are hashed.
    return tuple(value) if isinstance(value, list) else value
