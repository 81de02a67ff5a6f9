"""`logitjax gw`: a table of bounds of two files, and errors that name the file."""

import re

import numpy as np
import pytest

from logitjax.commands import gw


def write(directory, *arrays):
    paths = [str(directory / f"{name}.npy") for name in "ab"]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    return tuple(paths)


def test_two_matrices_give_a_table_whose_lower_bounds_are_below_its_value(tmp_path, capsys):
    c, d = np.square(np.random.default_rng(0).normal(size=(2, 5, 5)))
    gw.run(gw.Config(graphs=write(tmp_path, c, d), refine="none"))
    printed = capsys.readouterr().out
    assert "5 and 5 nodes" in printed
    closed, certificate = (re.split(r" *\| *", line) for line in printed.splitlines()[-2:])
    assert closed[1] == "closed form"
    assert certificate[1] == "certificate"
    assert float(closed[2]) <= float(certificate[2]) <= float(certificate[4])


def test_what_is_not_a_graph_is_refused_with_its_file(tmp_path):
    paths = write(tmp_path, np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"graphs: expected a square matrix in .*a\.npy"):
        gw.run(gw.Config(graphs=paths))
    with pytest.raises(ValueError, match="graphs: expected two files, got 1"):
        gw.run(gw.Config(graphs=paths[:1]))
