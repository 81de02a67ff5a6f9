"""Fusion strategies as flags write them."""

import ast
import dataclasses
from typing import Any

from logitjax import fusion

STRATEGIES: dict[str, type] = {
    "contrastive": fusion.ContrastiveDecoding,
    "dexperts": fusion.DExperts,
    "dynamic": fusion.DynamicFusion,
    "eft": fusion.EmulatedFineTuning,
    "logit_difference": fusion.LogitDifference,
    "proxy": fusion.ProxyTuning,
}


def strategy(spec: str | None) -> Any:
    """A fusion strategy from `name` or `name:field=value,...`; None from None.

    >>> strategy("dynamic:method=grid,num=11").num
    11

    Raises:
        ValueError: There is no such strategy, or it has no such field.
    """
    if spec is None:
        return None
    name, _, settings = spec.partition(":")
    if name not in STRATEGIES:
        raise ValueError(f"fusion: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    fields = {field.name for field in dataclasses.fields(STRATEGIES[name])}
    arguments = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not equals or key not in fields:
            raise ValueError(
                f"fusion: {name} takes {', '.join(sorted(fields))} as key=value, got {setting!r}"
            )
        try:
            arguments[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            arguments[key] = value
    return STRATEGIES[name](**arguments)
