"""Losses compiled for absent chips: what a chip cannot hold is a row like others."""

import json
from importlib import resources

import jax
import pytest

from experiments import gallery
from experiments.benchmarks import accelerator
from experiments.plan import chips


def test_a_form_that_does_not_fit_is_a_row_with_what_it_wanted(monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: HLO temporaries, required (20.00G) exceeds available HBM (16.00G)."
        )

    chip = chips.parse_chip("cpu:1")
    shape = (16, 8, 32)
    fitting = accelerator._row("ours", "kl", shape, chip, accelerator.forms("kl")["ours, default"])
    monkeypatch.setattr(accelerator, "_compile", refuse)
    dense = accelerator._row("dense", "kl", shape, chip, accelerator.forms("kl")["dense"])
    assert dense["temp MiB"] == 20 * 1024
    assert "exceeds available" in dense["does not fit"]
    accelerator._compare([dense, fitting])
    assert fitting["temp / dense"] == pytest.approx(fitting["temp MiB"] / (20 * 1024))
    assert "cycles / dense" not in fitting
    assert "products, F" in fitting


def test_tiles_that_kernels_look_up_are_those_that_were_compiled():
    table = json.loads((resources.files("logitjax.losses.sweep") / "tiles.json").read_text())
    compiled = {}
    for path in (gallery.DOCS / "results" / "kernels").glob("*.json"):
        compiled |= accelerator.tiles(json.loads(path.read_text()))
    assert compiled == table
    # What is refused stands there too.
    assert [] in table.values()
