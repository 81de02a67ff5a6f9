"""Tables and bars."""

import json

from experiments import benchmark
from experiments.benchmarks import _suite
from experiments.shared import report, timing


def test_table_has_the_union_of_columns_in_order():
    table = report.markdown_table([{"a": 1, "b": 0.123456}, {"a": None, "c": "x"}])
    assert table.splitlines() == [
        "| a | b      | c |",
        "|---|--------|---|",
        "| 1 | 0.1235 | - |",
        "| - | -      | x |",
    ]


def test_spread_is_the_sample_deviation():
    assert report.mean_and_spread([1.0, 2.0, 3.0]) == "2 +- 1"
    assert report.mean_and_spread([2.5]) == "2.5"
    assert report.mean_and_spread([0.35, 0.35, 0.35]) == "0.35 +- 0"
    assert report.mean_and_spread([1.0, float("inf")]) == "inf +- nan"


def test_ratio_is_the_median_of_neighbours():
    assert timing.paired_ratio([1.0, 10.0, 3.0], [1.0, 5.0, 1.0]) == 2.0


def test_bars_know_their_sense():
    assert _suite.Bar(name="time", value=1.0, limit=1.1).met
    assert not _suite.Bar(name="speed", value=1.0, limit=1.1, sense=">=").met


def test_compare_flags_what_got_worse():
    old = {"bars": [{"name": "time", "value": 1.0}, {"name": "speed", "value": 10.0}]}
    bars = [
        _suite.Bar(name="time", value=1.3, limit=2.0),
        _suite.Bar(name="speed", value=9.9, limit=2.0, sense=">="),
    ]
    time, speed = benchmark.compare(old, bars).splitlines()[2:]
    assert "regressed" in time
    assert "regressed" not in speed


def test_results_are_written(tmp_path):
    options = _suite.Options(directory=tmp_path / "x", scale="smoke")
    result = _suite.Result(rows=[{"n": 1}], bars=[_suite.Bar(name="b", value=2.0, limit=1.0)])
    text = _suite.write("x", result, options)
    assert "MISSED" in text
    record = json.loads((tmp_path / "x" / "results.json").read_text())
    assert record["rows"] == [{"n": 1}]
    assert record["bars"][0]["met"] is False


def test_every_benchmark_says_what_it_is():
    import importlib

    for name in benchmark.names():
        module = importlib.import_module(f"experiments.benchmarks.{name}")
        assert module.__doc__
        assert callable(module.run)


def test_page_shows_finished_results_of_full_scale(tmp_path):
    bar = _suite.Bar(name="time", value=3.0, limit=2.0)
    result = _suite.Result(rows=[{"step": "one", "seconds": 0.5}], bars=[bar])
    for name, scale in (("resume", "full"), ("loading", "smoke")):
        options = _suite.Options(directory=tmp_path / name, scale=scale)
        _suite.write(name, result, options)
    text = benchmark.page(tmp_path)
    assert "## resume" in text
    assert "| one  | 0.5     |" in text
    assert "MISSED" in text
    assert "loading" not in text
