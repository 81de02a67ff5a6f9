"""Run benchmarks: ``python -m experiments.benchmark [all | NAME ...] [--list] [--scale=...]``.

Each leaves ``results.json``, ``table.csv``, ``table.md`` and plots under ``WORKDIR/NAME``, prints
its table, and says whether the figures that were promised were reached.
``--compare=OLD/results.json`` lists what got worse; ``--page`` prints finished results as Markdown.
"""

import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import benchmarks
from experiments.benchmarks import _suite
from experiments.shared.report import markdown_table

_LIST = flags.DEFINE_bool("list", False, "Name the benchmarks and stop.")
_SCALE = flags.DEFINE_enum("scale", "full", ["smoke", "full"], "smoke: seconds; full: as reported.")
_REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Timed calls of each peer, in alternation.", lower_bound=1
)
_ONLY = flags.DEFINE_string(
    "only", "", "Parts of a benchmark that has some: areas of mutations, with commas between them."
)
_TEMPLATES = flags.DEFINE_string(
    "templates", None, "Folder of archives with chat templates, for compatibility."
)
_AGAINST = flags.DEFINE_string(
    "against", "", "A commit: time its library beside this one, in vocabulary_losses."
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/benchmarks", "Results go to WORKDIR/NAME.")
_PAGE = flags.DEFINE_bool(
    "page", False, "Print what WORKDIR holds as the sections of docs/benchmarks.md, and stop."
)
_COMPARE = flags.DEFINE_string(
    "compare", None, "An earlier results.json: list its bars beside these."
)


def names() -> list[str]:
    found = pkgutil.iter_modules(benchmarks.__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def compare(old: Mapping[str, Any], bars: Sequence[_suite.Bar], *, slack: float = 0.1) -> str:
    """Bars of both runs side by side; ``regressed``: changed for the worse beyond ``slack``."""
    before = {bar["name"]: bar["value"] for bar in old["bars"]}
    rows = []
    for bar in bars:
        was = before.get(bar.name)
        worse = False
        if was:
            worse = (
                bar.value > was * (1 + slack)
                if bar.sense == "<="
                else bar.value < was * (1 - slack)
            )
        rows.append(
            {"bar": bar.name, "was": was, "is": bar.value, "": "regressed" if worse else ""}
        )
    return markdown_table(rows)


def page(workdir: Path) -> str:
    """Finished full-scale results, a section each: what, command, versions, tables."""
    sections = []
    for name in names():
        path = workdir / name / "results.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        if record["scale"] != "full":
            continue
        module = importlib.import_module(f"experiments.benchmarks.{name}")
        machine = record["environment"]
        bars = [_suite.Bar(**{k: v for k, v in b.items() if k != "met"}) for b in record["bars"]]
        sections += [
            f"## {name}\n",
            (module.__doc__ or "").strip().splitlines()[0] + "\n",
            f"`python -m experiments.benchmark {name}`, Python {machine['python']}, "
            f"jax {machine['jax']}, {machine['device']}.\n",
            markdown_table(record["rows"]) + "\n",
        ]
        if bars:
            sections.append(markdown_table([bar.as_row() for bar in bars]) + "\n")
    return "\n".join(sections)


def main(argv: Sequence[str]) -> None:
    known = names()
    if _PAGE.value:
        print(page(Path(_WORKDIR.value)))
        return
    if _LIST.value:
        for name in known:
            module = importlib.import_module(f"experiments.benchmarks.{name}")
            print(f"{name:24s} {(module.__doc__ or '').strip().splitlines()[0]}")
        return
    wanted = list(argv[1:]) or ["all"]
    unknown = sorted(set(wanted) - {*known, "all"})
    if unknown:
        raise app.UsageError(
            f"unknown benchmark {unknown[0]!r}: expected one of {', '.join(known)}"
        )
    for name in known if "all" in wanted else wanted:
        module = importlib.import_module(f"experiments.benchmarks.{name}")
        options = _suite.Options(
            directory=Path(_WORKDIR.value) / name,
            scale=_SCALE.value,
            repeats=_REPEATS.value,
            only=_ONLY.value,
            templates=None if _TEMPLATES.value is None else Path(_TEMPLATES.value),
            against=_AGAINST.value,
        )
        result = module.run(options)
        print(f"\n## {name}\n\n{_suite.write(name, result, options)}", flush=True)
        if _COMPARE.value:
            old = json.loads(Path(_COMPARE.value).read_text())
            if old["name"] == name:
                print("\n" + compare(old, result.bars))


if __name__ == "__main__":
    app.run(main)
