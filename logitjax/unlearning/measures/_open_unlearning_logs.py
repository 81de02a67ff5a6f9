"""OpenUnlearning's logs, `TOFU_EVAL.json`, as logs of TOFU."""

from collections.abc import Mapping
from typing import Any

import numpy as np

# Their names of sets, and ours.
_SETS = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
# Fields of TOFU's logs, and where theirs are: of a metric of a set, by item.
_FIELDS = (
    ("avg_gt_loss", "{}_Q_A_Prob", "avg_loss"),
    ("avg_paraphrased_loss", "{}_Q_A_PARA_Prob", "avg_loss"),
    ("average_perturb_loss", "{}_Q_A_PERT_Prob", "avg_loss"),
    ("rougeL_recall", "{}_Q_A_ROUGE", "rougeL_recall"),
)
# Of the forget set alone, without its name.
_FORGET = (
    ("extraction_strength", "extraction_strength", "score"),
    ("exact_memorization", "exact_memorization", "score"),
)
_MARK = "_Q_A_Prob"


def is_open_unlearning(source: Mapping[str, Any]) -> bool:
    """Whether these are its metrics by name."""
    return any(f"{name}{_MARK}" in source for name in _SETS)


def from_open_unlearning(source: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Logs by the name of their set."""
    logs: dict[str, dict[str, dict[str, Any]]] = {}
    for theirs, name in _SETS.items():
        if f"{theirs}{_MARK}" not in source:
            continue
        fields = [(field, metric.format(theirs), key) for field, metric, key in _FIELDS]
        log = {
            field: _column(source, metric, key)
            for field, metric, key in (*fields, *(_FORGET if theirs == "forget" else ()))
            if metric in source
        }
        # The real-world sets have no paraphrase: the answer stands in for it.
        log.setdefault("avg_paraphrased_loss", log["avg_gt_loss"])
        wrong = log.get("average_perturb_loss")
        if wrong is None:
            del log["avg_paraphrased_loss"]
        else:
            log["average_perturb_loss"] = {k: np.ravel(v).tolist() for k, v in wrong.items()}
        logs[name] = log
    return logs


def _column(source: Mapping[str, Any], metric: str, key: str) -> dict[str, Any]:
    values = source[metric].get("value_by_index") if isinstance(source[metric], Mapping) else None
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{metric}: expected 'value_by_index', one entry an item")
    found = {}
    for item, entry in values.items():
        value = entry.get(key) if isinstance(entry, Mapping) else None
        if value is None:
            raise ValueError(f"{metric}: item {item} has no {key!r}")
        found[str(item)] = value
    return found
