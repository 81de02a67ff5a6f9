"""A share of the damaged files that `benchmark files` reads, without a process of their own."""

import pytest

from tests.rigs import _files_worker, files
from tests.rigs._files_kinds import KINDS

# Models and heads are compiled for.
QUICK = sorted(set(KINDS) - {"model", "model, gguf", "head"})


@pytest.fixture(scope="module")
def watch():
    return _files_worker.Watch()


@pytest.mark.parametrize("kind", QUICK)
def test_a_damaged_file_loads_or_ends_in_one_line(kind, tmp_path, watch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(KINDS[kind].count - 5, KINDS[kind].count):
        row = _files_worker.read(kind, number, tmp_path, watch)
        assert not files.is_wrong(row), row


@pytest.mark.slow
def test_the_smoke_scale_of_the_benchmark_meets_its_bars(tmp_path):
    from experiments.shared import suite

    options = suite.Options(directory=tmp_path, scale="smoke", only="safetensors,gzip")
    result = files.run(options)
    # Two kinds alone are not as many files as all.
    assert [bar.name for bar in result.bars if not bar.met] == ["files"]
    again = files.run(options)
    assert again.rows == result.rows
