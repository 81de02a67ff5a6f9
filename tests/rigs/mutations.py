"""Small faults are put into the library one at a time: do the tests that should notice fail?

Mutants come from rules (`_mutants`) and are drawn by a seed; each goes into a copy of the tree and
meets the tests that ``mutants.toml`` names for its file, and the file's own doctests. What
survives is listed with its edit and killed by a new test, or explained in
``mutants.toml``. Results are kept as they come, and hold as long as the file and its
tests stay as they are: a run that was ended goes on. ``--only=losses,step`` runs some areas,
``--seed=7`` draws others than the standing ones: would tests notice what they were not written for?
"""

import collections
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.shared import suite
from experiments.shared.report import markdown_table
from experiments.shared.suite import ROOT
from tests.rigs import _mutants
from tests.rigs._mutants import Mutant

_TABLE = Path(__file__).with_name("mutants.toml")
_SEED = 24

# What a smoke run tries: tests of these compile little.
_SMOKE = ("data/order", "data/documents", "storage/torch_checkpoint")

# Without an end in sight a mutant may fill the memory; threads' stacks count here too.
_MOST_BYTES = 24 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A mutant and the tests that should notice."""

    mutant: Mutant
    area: str
    tests: Sequence[str]
    name: str = ""

    @property
    def key(self) -> str:
        """One text for one mutant, whatever the line it has moved to."""
        mutant = self.mutant
        return "\n".join([mutant.path, mutant.rule, mutant.before, "->", mutant.after])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Area:
    """Files that are mutated together: how often, and which tests should notice, by file."""

    mutants: int
    tests: Mapping[str, Sequence[str]]


def paths(root: Path, folder: str, name: str) -> list[str]:
    """The files that a name of `mutants.toml` means, from the root of the tree.

    Raises:
        ValueError: It means none, or several without a star.
    """
    *inside, last = name.split("/")
    pattern = "/**/".join([folder, *inside, "*.py"])
    files = (path for path in root.glob(pattern) if path.stem != "__init__")
    matches = [path for path in files if fnmatch.fnmatch(path.stem.lstrip("_"), last)]
    if len(matches) != 1 and not (matches and "*" in last):
        raise ValueError(f"{name}: expected one file below {folder}, got {len(matches)}")
    return sorted(str(path.relative_to(root)) for path in matches)


@functools.cache
def table() -> Mapping[str, Any]:
    return tomllib.loads(_TABLE.read_text())


@functools.cache
def areas(root: Path) -> dict[str, Area]:
    """The areas of `mutants.toml` by name."""
    made = {}
    for area, content in table()["areas"].items():
        named = [(module, _own_test(module)) for module in content.get("modules", ())]
        named += [
            (m, tests) for tests, modules in content.get("tests", {}).items() for m in modules
        ]
        tests = {
            file: tuple(p for test in names.split() for p in paths(root, "tests", test))
            for module, names in named
            for file in paths(root, "logitjax", module)
        }
        made[area] = Area(mutants=content["mutants"], tests=tests)
    return made


def _own_test(module: str) -> str:
    return f"{module.split('/')[0]}/test_{module.split('/')[-1]}"


@functools.cache
def equivalents(root: Path) -> Mapping[tuple[str, str, str], str]:
    """By file and lines, why no test can tell a mutant from the library."""
    return {
        (path, entry["before"], entry["after"]): entry["why"]
        for entry in table()["equivalent"]
        for path in paths(root, "logitjax", entry["file"])
    }


def by_hand(root: Path) -> list[tuple[str, Mutant]]:
    """Faults that tests once let pass, by name; ValueError: its text is not once in its file."""
    made = []
    for entry in table()["fault"]:
        texts = {path: (root / path).read_text() for path in paths(root, "logitjax", entry["file"])}
        # Of several files the one that has the text, which the maker of the mutant asks for.
        path = max(texts, key=lambda path: texts[path].count(entry["before"]))
        edit = (entry["before"], entry["after"])
        made.append((entry["name"], _mutants.named(path, texts[path], *edit)))
    return made


def cases(
    root: Path, chosen: Mapping[str, Area], named: Iterable[tuple[str, Mutant]], seed: int
) -> list[Case]:
    """The mutants of some areas: those written by hand first, then those drawn."""
    made: dict[tuple[str, int, int, str], Case] = {}
    for area, content in chosen.items():
        texts = {path: (root / path).read_text() for path in content.tests}
        drawn = [("", mutant) for mutant in _mutants.choose(texts, content.mutants, seed)]
        for name, mutant in [*(pair for pair in named if pair[1].path in texts), *drawn]:
            case = Case(mutant=mutant, area=area, tests=content.tests[mutant.path], name=name)
            made.setdefault((mutant.path, mutant.start, mutant.end, mutant.new), case)
    return list(made.values())


def fresh_cases(root: Path, chosen: Mapping[str, Area], seed: int) -> list[Case]:
    """As many mutants of each area as it has, none of which is on the standing list."""
    standing = {case.key for case in cases(root, chosen, by_hand(root), _SEED)}
    more = {name: dataclasses.replace(a, mutants=3 * a.mutants) for name, a in chosen.items()}
    new = [case for case in cases(root, more, (), seed) if case.key not in standing]
    return [
        case
        for name, area in chosen.items()
        for case in [case for case in new if case.area == name][: area.mutants]
    ]


class Laboratory:
    """A copy of the tree `root` in which one file at a time is changed, and where tests run.

    Args:
      directory: where the copy, the log and compiled programs go.
      package: what is mutated; its name at the top of the tree.
      marks: which tests run, as pytest's ``-m``.
    """

    def __init__(self, root: Path, directory: Path, *, package: str, marks: str = ""):
        self._root, self._marks = root, marks
        self._tree, self._log = directory / "tree", directory / "pytest.log"
        shutil.rmtree(self._tree, ignore_errors=True)
        for name in (package, "tests"):
            skipped = shutil.ignore_patterns("__pycache__", ".cache")
            shutil.copytree(root / name, self._tree / name, ignore=skipped)
        for name in ("setup.cfg", "pyproject.toml"):
            if (root / name).exists():
                shutil.copy2(root / name, self._tree / name)
        self._environment = {
            "JAX_COMPILATION_CACHE_DIR": str(directory / "jax"),
            **os.environ,
            "PYTHONPATH": str(self._tree),
        }
        # One that is installed elsewhere must not be tested in its stead.
        where = f"import importlib.util as u; print(u.find_spec({package!r}).origin)"
        file = subprocess.check_output([sys.executable, "-c", where], text=True, **self._place)
        if not Path(file).is_relative_to(self._tree):
            raise RuntimeError(f"{package} is {file.strip()}, which is not in {self._tree}")

    @property
    def _place(self) -> dict[str, Any]:
        return {"cwd": self._tree, "env": self._environment}

    def run(
        self, tests: Sequence[str], files: Sequence[str], *, limit: float, bytecode: bool
    ) -> dict[str, Any]:
        """Runs tests and the doctests of files until one fails.

        Args:
          limit: seconds of the processor, after which the tests are ended.
          bytecode: whether Python may keep what it compiled, which it must not of a mutant.

        Returns:
          ``code`` as pytest's or the negative of a signal, ``cpu`` in seconds, and ``failed``: the
          first test that did.
        """
        # Its own settings are for several processes; what pytest keeps would outlive a mutant.
        options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "-x", "--doctest-modules"]
        options += ["-m", self._marks] if self._marks else []
        python = [sys.executable] if bytecode else [sys.executable, "-B"]
        before = _children_cpu()
        with self._log.open("w") as log:
            process = subprocess.Popen(
                [*python, "-m", "pytest", *options, *tests, *files],
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._place,
            )
        seconds = int(limit) + 1
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
        try:
            code = process.wait(300 + 10 * limit)
        except subprocess.TimeoutExpired:
            code = -signal.SIGXCPU
        # What the tests started and left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", self._log.read_text(), re.MULTILINE)
        cpu = _children_cpu() - before
        return {"code": code, "cpu": cpu, "failed": failed[1] if failed else ""}

    def without(self, tests: Sequence[str], files: Sequence[str]) -> float:
        """Seconds of the processor that tests take where nothing is wrong, which they must show."""
        outcome = self.run(tests, files, limit=3600, bytecode=True)
        if outcome["code"]:
            raise RuntimeError(
                f"without a mutant pytest ended with {outcome['code']} at {outcome['failed']!r} "
                f"of {', '.join(tests)}:\n{self._log.read_text()[-4000:]}"
            )
        return outcome["cpu"]

    def outcome(self, mutant: Mutant, tests: Sequence[str], usual: float) -> dict[str, Any]:
        """Whether tests notice a mutant: ``verdict``, ``by`` and ``cpu``."""
        with self.changed(mutant):
            # Beyond what is usual there may be programs to compile that the library has not.
            limit = 120 + 5 * usual
            outcome = self.run(tests, [mutant.path], limit=limit, bytecode=False)
        code = outcome["code"]
        if code in (3, 4, 5):
            text = self._log.read_text()[-4000:]
            raise RuntimeError(f"pytest could not run {', '.join(tests)}:\n{text}")
        by = outcome["failed"] or ("" if code >= 0 else f"signal {-code}")
        return {
            "verdict": "killed" if code else "survived",
            "by": by,
            "cpu": round(outcome["cpu"], 1),
        }

    @contextlib.contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        path, original = self._tree / mutant.path, self._root / mutant.path
        before = path.stat()
        path.write_text(mutant.apply(path.read_text()))
        # Python keeps what it compiled by time and size, and both may well be equal.
        os.utime(path, (before.st_atime, before.st_mtime + 100_000))
        try:
            yield
        finally:
            shutil.copy2(original, path)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Record:
    """Outcomes on disk, each under the text of its mutant, its file and its tests."""

    def __init__(self, path: Path, root: Path):
        self._path, self._root = path, root
        self._digest = functools.cache(self._digest_of)
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                # The last line of a run that was ended may be half of one.
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    self._known[entry["key"], entry["digest"]] = entry

    def _digest_of(self, files: tuple[str, ...]) -> str:
        digest = hashlib.sha256()
        for file in files:
            digest.update((self._root / file).read_bytes())
        return digest.hexdigest()

    def get(self, case: Case) -> dict[str, Any] | None:
        return self._known.get((case.key, self._digest((case.mutant.path, *case.tests))))

    def put(self, case: Case, outcome: Mapping[str, Any]) -> None:
        digest = self._digest((case.mutant.path, *case.tests))
        entry = {"key": case.key, "digest": digest, **outcome}
        self._known[case.key, digest] = entry
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def examine(
    laboratory: Laboratory, chosen: Sequence[Case], record: Record
) -> list[tuple[Case, dict[str, Any]]]:
    """Outcomes of all cases, those on record as they are."""
    groups: dict[Sequence[str], list[Case]] = collections.defaultdict(list)
    for case in chosen:
        if record.get(case) is None:
            groups[case.tests].append(case)
    left = sum(map(len, groups.values()))
    if left:
        print(f"{len(chosen)} mutants, {left} of them to try", flush=True)
    done = 0
    for tests, group in groups.items():
        usual = laboratory.without(tests, sorted({case.mutant.path for case in group}))
        print(f"{' '.join(tests)}: {usual:.1f} CPU-seconds without a mutant", flush=True)
        for case in group:
            outcome = laboratory.outcome(case.mutant, tests, usual)
            record.put(case, outcome)
            done += 1
            mutant = case.mutant
            print(
                f"[{done}/{left}] {outcome['verdict']:8s} {outcome['cpu']:5.1f} s {mutant.rule} "
                f"{mutant.path}:{mutant.line} {outcome['by']}",
                flush=True,
            )
    return [(case, record.get(case) or {}) for case in chosen]


def _explained(mutant: Mutant) -> str:
    """Why a mutant changes nothing; empty where it does."""
    return equivalents(ROOT).get((mutant.path, mutant.before, mutant.after), "")


def _counts(outcomes: Sequence[tuple[Case, str]], part: str) -> list[dict[str, Any]]:
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case, verdict in outcomes:
        rows[case.mutant.path if part == "file" else case.mutant.rule][verdict] += 1
    verdicts = ("killed", "survived", "equivalent")
    return [
        {part: name, "mutants": sum(counts.values()), **{v: counts[v] for v in verdicts}}
        for name, counts in sorted(rows.items())
    ]


def _page(outcomes: Sequence[tuple[Case, str]]) -> str:
    parts = ["# Mutants\n", markdown_table(_counts(outcomes, "file")) + "\n"]
    parts += [markdown_table(_counts(outcomes, "rule")) + "\n"]
    for verdict in ("survived", "equivalent"):
        parts.append(f"## {verdict.capitalize()}\n")
        for case, seen in outcomes:
            if seen == verdict:
                parts.append(_described(case))
    return "\n".join(parts)


def _described(case: Case) -> str:
    mutant, explained = case.mutant, _explained(case.mutant)
    edit = [f"- {line}" for line in mutant.before.splitlines()]
    edit += [f"+ {line}" for line in mutant.after.splitlines()]
    text = f"`{mutant.path}:{mutant.line}`, {mutant.rule}"
    text += f": {case.name}" if case.name else ""
    end = explained or f"Tests that ran: {', '.join(case.tests)}."
    return "\n".join([text, "", "```diff", *edit, "```", "", end, ""])


def run(options: suite.Options) -> suite.Result:
    """Tries every mutant of the areas that were asked for, and writes ``mutants.md``."""
    known_areas = areas(ROOT)
    chosen_areas = {name: known_areas[name] for name in options.parts(list(known_areas))}
    if options.smoke:
        few = {path for name in _SMOKE for path in paths(ROOT, "logitjax", name)}
        tests = {f: t for area in chosen_areas.values() for f, t in area.tests.items() if f in few}
        chosen_areas = {"smoke": Area(mutants=5, tests=tests)}
    if fresh := options.seed is not None:
        chosen = fresh_cases(ROOT, chosen_areas, options.seed)
    else:
        chosen = cases(ROOT, chosen_areas, () if options.smoke else by_hand(ROOT), _SEED)
    options.directory.mkdir(parents=True, exist_ok=True)
    directory = options.directory.resolve()
    # What is known to change nothing is not tried.
    tried = [case for case in chosen if not _explained(case.mutant)]
    record = Record(directory / "outcomes.jsonl", ROOT)
    laboratory = Laboratory(ROOT, directory, package="logitjax", marks="not slow or every_change")
    verdicts = {case.key: seen["verdict"] for case, seen in examine(laboratory, tried, record)}
    outcomes = [(case, verdicts.get(case.key, "equivalent")) for case in chosen]
    (directory / "mutants.md").write_text(_page(outcomes))
    for case, verdict in outcomes:
        if verdict == "survived":
            print("\n" + _described(case), flush=True)
    killed = [case for case, verdict in outcomes if verdict == "killed"]
    bars = [
        suite.at_least(
            "killed, of the mutants that are no equivalents",
            len(killed) / max(1, len(verdicts)),
            0.95,
        )
    ]
    if fresh:
        bars.append(suite.at_least("fresh mutants that are no equivalents", len(verdicts), 40))
    elif not options.smoke:
        passed = sum(verdict != "killed" for case, verdict in outcomes if case.name)
        bars.append(suite.at_most("faults that tests once let pass and still do", passed, 0))
        if len(chosen_areas) == len(known_areas):
            bars.append(suite.at_least("mutants", len(outcomes), 150))
    return suite.Result(rows=_counts(outcomes, "file"), bars=bars)
