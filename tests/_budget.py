"""A pytest plugin: what each test file costs in CPU-seconds and in compiled programs.

Three quarters of a test's time are tracing and compiling, and the suite stays cheap only where
somebody counts. Programs are counted whether XLA compiles them or the persistent cache has them, so
the count is the same warm and cold. With `--strict-budget` a test that needs more than
`MOST_PROGRAMS` fails, unless it is marked `many_programs` with a reason. It is not charged for its
fixtures, nor for what a test before it compiled: run alone, it has its full count. A doctest shows
what a reader types, operation by operation, and may have twice as many.
"""

import collections
import os

import jax
import jax.monitoring
import numpy as np
import pytest

MOST_PROGRAMS = 20
# What `make test` may cost, from an empty cache.
MOST_CPU_SECONDS, MOST_PROGRAMS_IN_ALL = 400, 3_000
_COMPILED = "/jax/core/compile/backend_compile_duration"
_programs = 0


def _count(event: str, seconds: float, **_: object) -> None:
    global _programs
    _programs += event == _COMPILED


def _cpu_seconds() -> float:
    """Of this process and of the children it has waited for."""
    return sum(os.times()[:4])


class Budget:
    """Measures on workers, adds up and prints where the reports arrive."""

    def __init__(self) -> None:
        jax.monitoring.register_event_duration_secs_listener(_count)
        self._last = (_cpu_seconds(), 0)
        self._by_file: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0, 0])
        self._of_workers: list[tuple[float, int]] = []

    def pytest_collection_finish(self):
        """Keys are made all over: by whom first is a matter of order, and no test's doing."""
        first, _ = jax.random.split(jax.random.key(np.uint32(0)))
        jax.random.key(0)
        jax.random.fold_in(first, 1)
        jax.random.key_data(first)
        self._last = (_cpu_seconds(), _programs)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        now = (_cpu_seconds(), _programs)
        report.cpu_seconds, report.programs = (b - a for a, b in zip(self._last, now, strict=True))
        self._last = now
        strict = item.config.getoption("strict_budget")
        most = MOST_PROGRAMS * (2 if isinstance(item, pytest.DoctestItem) else 1)
        if (
            strict
            and report.when == "call"
            and report.passed
            and report.programs > most
            and item.get_closest_marker("many_programs") is None
        ):
            report.outcome = "failed"
            report.longrepr = (
                f"{report.programs} compiled programs, more than {most}: call what is "
                "tested through one jax.jit and make inputs in numpy, or mark the test "
                "many_programs(reason)"
            )
        return report

    def pytest_runtest_logreport(self, report):
        cost = self._by_file[report.nodeid.partition("::")[0]]
        cost[0] += getattr(report, "cpu_seconds", 0.0)
        cost[1] += getattr(report, "programs", 0)
        cost[2] += report.when == "call"

    def pytest_sessionfinish(self, session):
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["cost"] = (_cpu_seconds(), _programs)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        # A worker that died has no output.
        output = getattr(node, "workeroutput", None) or {}
        if "cost" in output:
            self._of_workers.append(output["cost"])

    def pytest_terminal_summary(self, terminalreporter):
        if not self._by_file:
            return
        terminalreporter.section("CPU-seconds, programs and tests by file")
        rows = sorted(self._by_file.items(), key=lambda row: -row[1][0])
        shown = rows if terminalreporter.config.getoption("verbose") > 0 else rows[:25]
        for name, (seconds, programs, tests) in shown:
            terminalreporter.line(f"{seconds:7.1f} {programs:6d} {tests:5d}  {name}")
        seconds, programs, tests = (sum(column) for column in zip(*self._by_file.values()))
        terminalreporter.line(f"{seconds:7.1f} {programs:6d} {tests:5d}  in all files")
        # Imports and the collection of tests belong to no file.
        seconds = _cpu_seconds() if not self._of_workers else sum(os.times()[:2])
        programs = _programs
        for of_worker in self._of_workers:
            seconds += of_worker[0]
            programs += of_worker[1]
        terminalreporter.line(
            f"{seconds:.0f} CPU-seconds and {programs} programs with imports; the whole of "
            f"`make test` may cost {MOST_CPU_SECONDS} and {MOST_PROGRAMS_IN_ALL}"
        )
