"""Shared parts of benchmarks and rigs: options, bars, output files, and the command."""

import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import pkgutil
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from etils import epath

from experiments.shared import figures
from experiments.shared.report import bar, markdown_table, write_report

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Output folder, and duration of a benchmark: ``scale`` is ``smoke`` or ``full``.

    ``only`` names parts of a benchmark, separated by commas; ``against`` is a commit to compare
    with, ``templates`` a folder of archives with chat templates, and ``seed`` draws cases that no
    earlier run has seen.
    """

    directory: Path
    scale: str = "full"
    repeats: int = 5
    only: str = ""
    against: str = ""
    templates: Path | None = None
    seed: int | None = None

    @property
    def smoke(self) -> bool:
        return self.scale == "smoke"

    def parts(self, names: Sequence[str]) -> list[str]:
        """The known parts that ``only`` names, in its order; all if it names none.

        Raises:
            ValueError: ``only`` names an unknown part.
        """
        parts = [name for name in self.only.split(",") if name] or list(names)
        if unknown := sorted(set(parts) - set(names)):
            raise ValueError(f"only: expected some of {', '.join(names)}, got {unknown[0]!r}")
        return parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A promised figure: ``value`` has to be ``sense`` ``limit``."""

    name: str
    value: float
    limit: float
    sense: str = "<="

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.sense == "<=" else self.value >= self.limit

    def as_row(self) -> dict[str, Any]:
        return bar(self.name, self.value, f"{self.sense} {self.limit:g}", self.met)


def at_most(name: str, value: float, limit: float) -> Bar:
    """A figure that may not be larger."""
    return Bar(name=name, value=value, limit=limit)


def at_least(name: str, value: float, limit: float) -> Bar:
    """A figure that may not be smaller."""
    return Bar(name=name, value=value, limit=limit, sense=">=")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Rows of a table (any columns), the bars they decide, and pictures by the names of files."""

    rows: Sequence[Mapping[str, Any]]
    bars: Sequence[Bar] = ()
    pictures: Mapping[str, figures.Picture] = dataclasses.field(default_factory=dict)


def total(rows: Sequence[Mapping[str, Any]], *columns: str) -> Any:
    """The sum of columns over all rows."""
    return sum(row[column] for row in rows for column in columns)


def temp_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of scratch memory that XLA plans for ``jit(function)(*arguments)``."""
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)


def memory_bytes(field: str, process: int | str = "self") -> int:
    """Bytes that a process holds (VmRSS), or has held at most (VmHWM); on Linux."""
    # Unlike these, getrusage starts from the parent's memory at the fork.
    status = Path(f"/proc/{process}/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's function returns in a new process, whose memory and programs are its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def write(result: Result, options: Options) -> str:
    """Write ``report.md``, ``results.json`` and pictures; return the text to print."""
    tables = {"measured": [dict(row) for row in result.rows]}
    if result.bars:
        tables["bars"] = [bar.as_row() for bar in result.bars]
    # A scale or a selection of parts may leave nothing to draw.
    pictures = {name: picture for name, picture in result.pictures.items() if picture.panels}
    text = "\n\n".join(map(markdown_table, tables.values()))
    return write_report(epath.Path(options.directory), text, tables=tables, pictures=pictures)


def names(package: types.ModuleType) -> list[str]:
    """The benchmarks of a package: its public modules."""
    modules = pkgutil.iter_modules(package.__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def load(package: types.ModuleType, name: str) -> tuple[Any, str]:
    """A benchmark and the first line of its docstring."""
    module = importlib.import_module(f"{package.__name__}.{name}")
    return module, (module.__doc__ or "").strip().splitlines()[0]


def main(package: types.ModuleType, workdir: str) -> None:
    """The command of a package of benchmarks; `workdir` is the default folder of results."""
    flags.DEFINE_bool("list", False, "Name all and stop.")
    flags.DEFINE_enum("scale", "full", ["smoke", "full"], "smoke: seconds; full: as reported.")
    flags.DEFINE_integer("repeats", 5, "Timed calls of each peer, in turns.", lower_bound=1)
    flags.DEFINE_string("only", "", "Parts of a benchmark that has parts, separated by commas.")
    flags.DEFINE_string("against", "", "A commit to compare with, for vocabulary_losses.")
    flags.DEFINE_string("templates", None, "Archives with chat templates, for compatibility.")
    flags.DEFINE_integer("seed", None, "Draws fresh cases, for mutations.")
    flags.DEFINE_string("workdir", workdir, "Results go to WORKDIR/NAME.")
    app.run(lambda argv: _run(package, argv, flags.FLAGS))


def _run(package: types.ModuleType, argv: Sequence[str], values: flags.FlagValues) -> None:
    existing, home = names(package), Path(values.workdir)
    if values.list:
        print("\n".join(f"{name:24s} {load(package, name)[1]}" for name in existing))
        return
    expected = list(argv[1:]) or ["all"]
    if unknown := sorted(set(expected) - {*existing, "all"}):
        raise app.UsageError(f"name: expected one of {', '.join(existing)}, got {unknown[0]!r}")
    for name in existing if "all" in expected else expected:
        module, _ = load(package, name)
        given: Any = {n: values[n].value for n in ("scale", "repeats", "only", "against", "seed")}
        templates = values.templates and Path(values.templates)
        options = Options(directory=home / name, templates=templates, **given)
        print(f"\n## {name}\n\n{write(module.run(options), options)}", flush=True)
