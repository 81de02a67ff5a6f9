"""TOFU's logs: one JSON file a set, ``{field: {item: value}}``."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from logitjax.storage import read_json
from logitjax.unlearning.measures._open_unlearning_logs import (
    from_open_unlearning,
    is_open_unlearning,
)

# Names of sets here, of files there.
LOG_FILES = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
AGGREGATED = "eval_log_aggregated.json"
OPEN_UNLEARNING = "TOFU_EVAL.json"

Log = Mapping[str, Any]


def log_file(name: str) -> str:
    """The file of a set; those that TOFU does not have are named like its own."""
    return LOG_FILES.get(name, f"eval_log_{name}.json")


def set_name(file: str) -> str | None:
    """The set of a file, None for files that are no logs."""
    for name, known in LOG_FILES.items():
        if file == known:
            return name
    if file == AGGREGATED or not (file.startswith("eval_log_") and file.endswith(".json")):
        return None
    return file.removeprefix("eval_log_").removesuffix(".json")


def read_logs(source: Any) -> dict[str, Log]:
    """Logs by the name of their set."""
    source = getattr(source, "logs", source)
    if isinstance(source, Mapping):
        if is_open_unlearning(source):
            source = from_open_unlearning(source)
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
    """Which items a log is about."""
    first = log["avg_gt_loss"]
    return [str(i) for i in range(len(first))] if isinstance(first, list) else list(first)


def plain(values: Any) -> Any:
    """Arrays and their numbers as JSON has them."""
    if isinstance(values, np.ndarray | np.generic):
        return values.tolist()
    return values
