"""The fuzzer of configurations: what it draws, without transformers."""

import itertools

import pytest

from logitjax.models import config_from_hf
from tests.rigs import _compatibility_fuzz as fuzz
from tests.rigs import _compatibility_templates as templates


def test_every_two_values_of_every_two_keys_meet():
    values = {"a": (0, 1, 2), "b": (fuzz.OUT, None), "c": (True, False), "d": ([1], [2], "x")}
    rows = fuzz.covering(values, 12, seed=0)
    assert fuzz.pairs_of(values, rows) == 1.0
    for (a, b), i, j in itertools.product(itertools.combinations(values, 2), range(3), range(3)):
        if i < len(values[a]) and j < len(values[b]):
            assert any(row[a] == values[a][i] and row[b] == values[b][j] for row in rows)
    assert fuzz.pairs_of(values, rows[:1]) < 0.5
    assert rows == fuzz.covering(values, 12, seed=0)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma3_text"])
def test_what_is_drawn_is_understood(family):
    rows = fuzz.covering(fuzz.VALUES[family], 4, seed=1)
    configs = [config_from_hf(fuzz.raw_config(family, row)) for row in rows]
    assert len(set(configs)) == 4
    assert {config.family for config in configs} == {family}


def test_templates_are_read_only_where_they_are_the_known_ones(tmp_path):
    assert sum(map(len, templates.members_of_archives().values())) >= 60
    assert list(templates.read_templates(tmp_path)) == []
