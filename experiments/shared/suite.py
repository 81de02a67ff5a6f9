"""What every benchmark shares: memory readings, bars, and the files it leaves."""

import csv
import dataclasses
import json
import re
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.shared.report import bar, command, environment, markdown_table
from logitjax.commands import figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where results go, and how long a benchmark may take: ``scale`` is ``smoke`` or ``full``.

    ``only`` names parts of a benchmark that has some, with commas between them; ``templates`` is a
    folder of archives with chat templates, ``against`` a commit to compare the library with.
    """

    directory: Path
    scale: str = "full"
    repeats: int = 5
    only: str = ""
    templates: Path | None = None
    against: str = ""

    @property
    def smoke(self) -> bool:
        return self.scale == "smoke"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure that was promised: ``value`` has to be ``sense`` ``limit``."""

    name: str
    value: float
    limit: float
    sense: str = "<="

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.sense == "<=" else self.value >= self.limit

    def as_row(self) -> dict[str, Any]:
        return bar(self.name, self.value, f"{self.sense} {self.limit:g}", self.met)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Rows of a table (any columns), the bars they decide, and pictures by the names of files."""

    rows: Sequence[Mapping[str, Any]]
    bars: Sequence[Bar] = ()
    pictures: Mapping[str, figures.Picture] = dataclasses.field(default_factory=dict)


def temp_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of scratch memory XLA plans for ``jit(function)(*arguments)``."""
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)


def peak_rss_bytes() -> int:
    """The most memory this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage starts from what the parent held when it forked.
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write(name: str, result: Result, options: Options) -> str:
    """Write ``results.json``, ``table.csv``, ``table.md``, pictures; return what to print."""
    options.directory.mkdir(parents=True, exist_ok=True)
    rows = [dict(row) for row in result.rows]
    bars = [bar.as_row() for bar in result.bars]
    record = {
        "name": name,
        "scale": options.scale,
        "command": command(),
        "environment": environment(),
        "rows": rows,
        "bars": [dataclasses.asdict(bar) | {"met": bar.met} for bar in result.bars],
        "pictures": {name: dataclasses.asdict(p) for name, p in result.pictures.items()},
    }
    (options.directory / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (options.directory / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    text = markdown_table(rows)
    if bars:
        text += "\n\n" + markdown_table(bars)
    (options.directory / "table.md").write_text(text + "\n")
    for name, picture in result.pictures.items():
        # A scale or a selection of parts may leave nothing to draw.
        if not picture.panels:
            continue
        text += f"\nplot: {figures.draw(options.directory / f'{name}.png', picture)}"
    return text
