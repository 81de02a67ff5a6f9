"""Tables and files that experiments leave for people: Markdown in, nothing to compute."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from logitjax import storage
from logitjax.commands.tables import format_value as format_value
from logitjax.commands.tables import markdown_table as markdown_table


def mean_and_spread(values: Sequence[float]) -> str:
    """`mean +- sample standard deviation`; the bare value where there is only one."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return format_value(mean)
    # Exact, so equal values have no spread instead of one of 1e-17; of finite values only.
    spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{format_value(mean)} +- {format_value(spread)}"


def bar(name: str, seen: float, promised: str, met: bool, **more: Any) -> dict[str, Any]:
    """A row of the table of what was promised."""
    verdict = "met" if met else "MISSED"
    return {"bar": name, **more, "seen": seen, "promised": promised, "": verdict}


def save_figure(figure: Any, path: epath.Path) -> epath.Path:
    """Writes a matplotlib figure as PNG and closes it."""
    from matplotlib import pyplot

    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=140)
    pyplot.close(figure)
    return path


def spread(records: Sequence[Mapping[str, Any]], name: str, factor: float = 1.0) -> str | None:
    """`mean_and_spread` of a number over the records that have it; None where none has."""
    values = [factor * record[name] for record in records if record.get(name) is not None]
    return mean_and_spread(values) if values else None


def write_report(workdir: epath.Path, text: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Writes `report.md` and its records to `metrics.jsonl`, a line each; returns the text."""
    storage.write_atomic(workdir / "report.md", text)
    lines = [json.dumps(record) + "\n" for record in records]
    storage.write_atomic(workdir / "metrics.jsonl", "".join(lines))
    return text


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences by seed, and the p-value of a two-sided paired t-test.

    The p-value is nan where the test says nothing: of one seed, and of differences that are equal,
    which have no variance to hold their mean against.
    """
    from scipy import stats

    difference = np.array(first) - np.array(second)
    # Shares of images: differences that are equal may be told apart by rounding alone.
    if len(difference) < 2 or np.ptp(difference) <= 1e-9:
        return float(difference.mean()), math.nan
    return float(difference.mean()), float(stats.ttest_rel(first, second).pvalue)
