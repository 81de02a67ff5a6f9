"""Tables and files that experiments write for people: Markdown in, nothing to compute."""

import dataclasses
import json
import math
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments.shared import figures
from logitjax import storage
from logitjax.commands.tables import format_value as format_value
from logitjax.commands.tables import markdown_table as markdown_table
from logitjax.commands.tables import text_cell as text_cell


def mean_and_spread(values: Sequence[float]) -> str:
    """`mean +- sample standard deviation`; the bare value if there is only one."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return format_value(mean)
    # Exact, so that equal values have no spread, rather than 1e-17; finite values only.
    spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{format_value(mean)} +- {format_value(spread)}"


def bar(name: str, seen: float, promised: str, met: bool, **more: Any) -> dict[str, Any]:
    """A row of the table of promised figures."""
    verdict = "met" if met else "MISSED"
    return {"bar": name, **more, "seen": seen, "promised": promised, "": verdict}


def spread(records: Sequence[Mapping[str, Any]], name: str, factor: float = 1.0) -> str | None:
    """`mean_and_spread` of a number over the records that have it; None if none has it."""
    values = [factor * record[name] for record in records if record.get(name) is not None]
    return mean_and_spread(values) if values else None


def write_report(
    workdir: epath.Path,
    text: str,
    *,
    records: Sequence[Mapping[str, Any]] | None = None,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    pictures: Mapping[str, figures.Picture],
) -> str:
    """Writes a finished run's files for people.

    Args:
        workdir: Gets `report.md`, `results.json` with tables and pictures as numbers, which
            `python -m experiments.gallery --add` takes, and a PNG file a picture.
        records: Other measurements, written to `metrics.jsonl`, one line each.
        tables: Rows by the table's name.
        pictures: Pictures by name, which is also the file's.
    """
    text = text.rstrip() + "\n"
    storage.write_atomic(workdir / "report.md", text)
    if records is not None:
        lines = [json.dumps(record) + "\n" for record in records]
        storage.write_atomic(workdir / "metrics.jsonl", "".join(lines))
    results = {
        "command": command(),
        "environment": environment(),
        "tables": tables,
        "pictures": {name: dataclasses.asdict(picture) for name, picture in pictures.items()},
    }
    storage.write_atomic(workdir / "results.json", json.dumps(results) + "\n")
    for name, picture in pictures.items():
        figures.draw(workdir / f"{name}.png", picture)
    return text


def command() -> str:
    """The running command, without the flags for its files."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else "NAME"
    flags = [flag for flag in sys.argv[1:] if not flag.startswith("--workdir")]
    return shlex.join(["python", "-m", name, *flags])


def environment() -> dict[str, Any]:
    """Return the versions and the machine of a measurement."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {device.device_kind}",
        "processor": platform.processor() or platform.machine(),
    }


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences by seed, and the p-value of a two-sided paired t-test.

    The p-value is nan if the test says nothing: with one seed, or with equal differences, which
    have no variance to test their mean against.
    """
    from scipy import stats

    difference = np.array(first) - np.array(second)
    # Shares of images: equal differences may differ by rounding alone.
    if len(difference) < 2 or np.ptp(difference) <= 1e-9:
        return float(difference.mean()), math.nan
    return float(difference.mean()), float(stats.ttest_rel(first, second).pvalue)
