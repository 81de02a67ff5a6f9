"""Where a run's time goes: parts that add up over kills, FLOPs, a profile on a signal."""

import contextlib
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from etils import epath

from logitjax import training
from logitjax.storage import progress
from logitjax.training import Goodput, matmul_flops
from tests.training import toy


def test_the_parts_of_a_run_that_was_killed_add_up_to_its_wall_clock(tmp_path, monkeypatch):
    """Ten starts by a clock of its own: each takes ten steps, of which a kill loses three."""
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)

    def spend(doing, seconds):
        nonlocal now
        progress.mark(doing)
        now += seconds

    for start in range(10):
        resumed = 7 * start
        ends = contextlib.suppress(KeyboardInterrupt)
        with ends, Goodput(epath.Path(tmp_path)).account():
            now += 4  # starting
            spend("loading a model", 2)
            spend(f"training from step {resumed} to 100", 0)
            spend("compiling the first step", 5)
            for step in range(resumed + 1, resumed + 11):
                spend("fetching a batch", 0.5)
                spend(f"taking step {step}", 2)
            spend("saving checkpoint", 1)
            spend(f"taking step {resumed + 11}", 0)
            if start < 9:
                raise KeyboardInterrupt
        # Killed: what came after the last record is not known.
        now += 30
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write('{"begin": 10')
    total = Goodput(epath.Path(tmp_path)).summary()
    assert total["wall"] == pytest.approx(now - 1000 - 30)
    assert sum(total["seconds"].values()) == pytest.approx(total["wall"])
    expected = {"start-up": 40, "preparation": 20, "compilation": 50, "data": 50, "save": 10}
    # Of ten steps of each start but the last three were made again.
    expected |= {"down": 270, "redone": 9 * 20 * 3 / 10, "step": 200 - 54}
    for name, seconds in expected.items():
        assert total["seconds"][name] == pytest.approx(seconds), name
    assert total["goodput"] == pytest.approx(146 / total["wall"])
    # A look at what had ended, a day later, adds what it takes itself.
    now += 86_400
    with Goodput(epath.Path(tmp_path)).account():
        now += 3
    again = Goodput(epath.Path(tmp_path)).summary()
    assert again["wall"] == pytest.approx(total["wall"] + 3)
    assert again["seconds"]["down"] == pytest.approx(270)
    with pytest.raises(ValueError, match=r"expected goodput\.jsonl"):
        Goodput(epath.Path(tmp_path / "other")).summary()


def test_records_are_two_seconds_old_at_most_and_starts_without_steps_have_no_goodput(
    tmp_path, monkeypatch
):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    record = Goodput(epath.Path(tmp_path))

    def spend(doing, seconds):
        nonlocal now
        progress.mark(doing)
        now += seconds

    def lines():
        path = tmp_path / "goodput.jsonl"
        return path.read_text().count("{") if path.exists() else 0

    written = []
    with record.account():
        for seconds in (1.5, 0.5, 0.1, 1.9, 0.2):
            now += seconds
            progress.mark("packing")
            written.append(lines())
    # Every line holds one object in another.
    assert written == [0, 0, 2, 2, 4]
    assert record.summary()["goodput"] == 0.0
    with record.account():
        pass
    # A checkpoint before this start's first one costs all of its steps, and no more.
    for first in (10, 4):
        with contextlib.suppress(KeyboardInterrupt), record.account():
            spend(f"training from step {first} to 100", 0)
            for step in (1, 2, 3):
                spend(f"taking step {first + step}", 2)
            spend(f"taking step {first + 4}", 0)
            raise KeyboardInterrupt
    total = record.summary()
    assert total["seconds"]["redone"] == total["seconds"]["step"] == 6
    assert sum(total["seconds"].values()) == pytest.approx(total["wall"])
    still = Goodput(epath.Path(tmp_path / "still"))
    with still.account():
        pass
    assert (still.summary()["wall"], still.summary()["goodput"]) == (0.0, 0.0)


def test_a_run_logs_its_rate_and_profiles_on_a_signal(tmp_path):
    """The rate is that of the step's matrix products, counted from what was traced once."""
    mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
    tx = toy.optimizer()
    state = training.TrainState.create(toy.init, tx, mesh=mesh)
    step = training.TrainStep(toy.loss_fn, tx, mesh=mesh)

    def batches(number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return toy.batches(number)

    before = signal.getsignal(signal.SIGUSR1)
    training.train_loop(
        state,
        step,
        batches,
        total_steps=9,
        workdir=tmp_path,
        writer=training.make_writer(tmp_path),
        options=training.LoopOptions(log_every=3),
    )
    assert signal.getsignal(signal.SIGUSR1) == before
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tflops_per_second"] * line["seconds_per_step"] for line in lines]
    np.testing.assert_allclose(rates, step.flops / 1e12)
    assert step.flops == matmul_flops(step.trace(*step._shapes).jaxpr) > 0
    assert step.traces == 1
    assert all(line["seconds_slowest_step"] > 0 <= line["data_seconds"] for line in lines)
