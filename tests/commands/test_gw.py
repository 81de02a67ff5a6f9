"""`logitjax gw`: a table of bounds of two files, and errors that name the file."""

import re
import sys
import types

import numpy as np
import pytest

from logitjax import transport
from logitjax.commands import gw


def write(directory, *arrays):
    paths = [str(directory / f"{name}.npy") for name in "ab"]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    return tuple(paths)


@pytest.mark.every_change
@pytest.mark.slow
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


@pytest.mark.every_change
@pytest.mark.slow
def test_a_solver_stands_beside_the_certificate_with_what_its_plan_costs(
    tmp_path, capsys, monkeypatch
):
    """The plan is the solver's; the value is the certificate's, of the plan repaired."""
    c, d = np.square(np.random.default_rng(0).normal(size=(2, 5, 5)))
    plan = np.full((5, 5), 1 / 25)
    solver = types.SimpleNamespace(
        gromov=types.SimpleNamespace(gromov_wasserstein=lambda *args, **options: plan)
    )
    monkeypatch.setitem(sys.modules, "ot", solver)
    gw.run(gw.Config(graphs=write(tmp_path, c, d), refine="none", solver="pot"))
    rows = [re.split(r" *\| *", line) for line in capsys.readouterr().out.splitlines()[-2:]]
    certificate, peer = rows
    assert peer[1] == "POT"
    cost = np.square(c[:, :, None, None] - d).mean() / np.square(d).mean()
    np.testing.assert_allclose(float(peer[4]), cost, rtol=1e-3)
    assert float(certificate[4]) <= float(peer[4])
    np.testing.assert_allclose(float(peer[5]), cost / float(certificate[2]), rtol=1e-2)


def test_a_solver_that_is_not_installed_is_named_with_what_to_install(tmp_path, monkeypatch):
    c, d = np.square(np.random.default_rng(0).normal(size=(2, 5, 5)))
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"package ot is not installed: pip install 'logitjax"):
        gw.run(gw.Config(graphs=write(tmp_path, c, d), refine="none", solver="pot"))


@pytest.mark.slow
@pytest.mark.every_change
def test_ott_stands_beside_the_certificate(tmp_path, capsys):
    z, w = np.abs(np.random.default_rng(0).normal(size=(2, 12, 16)))
    gw.run(gw.Config(graphs=write(tmp_path, z, w + 1), factors=True, solver="ott"))
    assert "ott, entropic" in capsys.readouterr().out
    c, d = (x.T @ x for x in (z, w + 1))
    plan, cost, reason = gw.entropic_gw(c, d)
    assert not reason
    differences = (c[:, :, None, None] - d) ** 2
    np.testing.assert_allclose(cost, np.einsum("ijkl,ik,jl->", differences, plan, plan), rtol=1e-3)
    bounds = transport.certificate(c, d, scale="none", bounds="third")
    assert bounds.lower <= cost
    assert "not converged" in gw.entropic_gw(c, d, max_iterations=2)[2]
