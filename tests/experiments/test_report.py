"""Tables, bars, and what benchmarks and rigs leave."""

import json

import pytest

from experiments import benchmarks
from experiments.shared import report, suite, timing
from tests import rigs


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
    assert suite.Bar(name="time", value=1.0, limit=1.1).met
    assert not suite.Bar(name="speed", value=1.0, limit=1.1, sense=">=").met


def test_results_are_written(tmp_path):
    options = suite.Options(directory=tmp_path / "x", scale="smoke")
    result = suite.Result(rows=[{"n": 1}], bars=[suite.Bar(name="b", value=2.0, limit=1.0)])
    text = suite.write(result, options)
    assert "MISSED" in text
    assert (tmp_path / "x" / "report.md").read_text() == text
    tables = json.loads((tmp_path / "x" / "results.json").read_text())["tables"]
    assert tables["measured"] == [{"n": 1}]
    assert tables["bars"][0]["promised"] == "<= 1"


@pytest.mark.parametrize("package", [benchmarks, rigs], ids=["benchmarks", "rigs"])
def test_every_benchmark_and_rig_says_what_it_is(package):
    assert "all" not in suite.names(package)
    for name in suite.names(package):
        module, line = suite.load(package, name)
        assert line
        assert callable(module.run)
