"""TOFU's logs: one JSON file a set, ``{field: {item: value}}``."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from logitjax.storage import read_json

# Names of sets here, of files there.
LOG_FILES = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
AGGREGATED = "eval_log_aggregated.json"
OPEN_UNLEARNING = "TOFU_EVAL.json"
# OpenUnlearning's names of sets, and ours.
_SETS = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
# Fields of TOFU's logs, and where theirs are: of a metric of a set, by item.
_FIELDS = (
    ("avg_gt_loss", "{}_Q_A_Prob", "avg_loss"),
    ("avg_paraphrased_loss", "{}_Q_A_PARA_Prob", "avg_loss"),
    ("average_perturb_loss", "{}_Q_A_PERT_Prob", "avg_loss"),
    ("rougeL_recall", "{}_Q_A_ROUGE", "rougeL_recall"),
)
# Fields of the forget set alone, without its name.
_FORGET = (
    ("extraction_strength", "extraction_strength", "score"),
    ("exact_memorization", "exact_memorization", "score"),
)
_MARK = "_Q_A_Prob"

Log = Mapping[str, Any]


def set_name(file: str) -> str | None:
    """The set of a file, None for files that are no logs."""
    for name, existing in LOG_FILES.items():
        if file == existing:
            return name
    if file == AGGREGATED or not (file.startswith("eval_log_") and file.endswith(".json")):
        return None
    return file.removeprefix("eval_log_").removesuffix(".json")


def read_logs(source: Any) -> dict[str, Log]:
    source = getattr(source, "logs", source)
    if isinstance(source, Mapping):
        if any(f"{name}{_MARK}" in source for name in _SETS):
            source = _from_open_unlearning(source)
        named = {set_name(key) or key: log for key, log in source.items()}
        return {name: check_log(log, name) for name, log in named.items()}
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"logs: expected a path or a mapping, got {type(source).__name__}")
    path = epath.Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no such file or directory: {path}")
    if not path.is_dir():
        return read_logs(read_json(path))
    files = {set_name(file.name): file for file in path.iterdir() if set_name(file.name)}
    if files:
        return {
            name: check_log(read_json(file), str(file))
            for name, file in sorted(files.items())
            if name is not None
        }
    for name in (AGGREGATED, OPEN_UNLEARNING):
        if (path / name).exists():
            return read_logs(read_json(path / name))
    raise ValueError(f"{path}: no logs in it (expected {', '.join(LOG_FILES.values())})")


def check_log(log: Any, where: str) -> Log:
    """The log itself, if it has what every metric starts from."""
    if not isinstance(log, Mapping) or not isinstance(log.get("avg_gt_loss"), Mapping | list):
        raise ValueError(f"{where}: not a log of TOFU's ('avg_gt_loss' is missing)")
    return log


def column(log: Log, field: str, where: str) -> list[Any] | None:
    """A field's values in the order of ``avg_gt_loss``; None if the log has no such field."""
    if field not in log:
        return None
    values, first = log[field], log["avg_gt_loss"]
    if isinstance(first, list):
        if not isinstance(values, Sequence) or len(values) != len(first):
            raise ValueError(f"{where}: {field!r} is not a list of {len(first)} items")
        return list(values)
    missing = [key for key in first if key not in values]
    if missing:
        raise ValueError(f"{where}: {field!r} lacks {len(missing)} items, first {missing[0]!r}")
    return [values[key] for key in first]


def items_of(log: Log) -> list[str]:
    first = log["avg_gt_loss"]
    return [str(i) for i in range(len(first))] if isinstance(first, list) else list(first)


def plain(values: Any) -> Any:
    """Arrays and their numbers as JSON has them."""
    if isinstance(values, np.ndarray | np.generic):
        return values.tolist()
    return values


def _from_open_unlearning(source: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Its logs, `TOFU_EVAL.json`, as logs of TOFU by the name of their set."""
    logs: dict[str, dict[str, dict[str, Any]]] = {}
    for other, name in _SETS.items():
        if f"{other}{_MARK}" not in source:
            continue
        fields = [(field, metric.format(other), key) for field, metric, key in _FIELDS]
        log = {
            field: _their_column(source, metric, key)
            for field, metric, key in (*fields, *(_FORGET if other == "forget" else ()))
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


def _their_column(source: Mapping[str, Any], metric: str, key: str) -> dict[str, Any]:
    values = source[metric].get("value_by_index") if isinstance(source[metric], Mapping) else None
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{metric}: expected 'value_by_index', one entry an item")
    entries = {}
    for item, entry in values.items():
        value = entry.get(key) if isinstance(entry, Mapping) else None
        if value is None:
            raise ValueError(f"{metric}: item {item} has no {key!r}")
        entries[str(item)] = value
    return entries
