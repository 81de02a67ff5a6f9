"""Shared parts of experiments: records that are measured once, training that goes on, reports."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.shared import fit
from experiments.shared.records import best_of, by_key, kept, tuned_seeds
from experiments.shared.report import bar, spread, write_report
from logitjax import training


def test_a_record_is_measured_once(tmp_path):
    path = epath.Path(tmp_path) / "results" / "one.json"
    asked = []

    def make():
        asked.append(1)
        return {"points": (1, 2)}

    assert kept(path, make) == kept(path, make) == {"points": [1, 2]}
    assert len(asked) == 1


def test_seeds_after_the_first_run_at_its_best_rate(tmp_path):
    ran = []

    def run(seed, rate):
        ran.append((seed, rate))
        return {"seed": seed, "lr": rate, "validation_nll": abs(rate - 2)}

    def at_best(seed, rates):
        return best_of(lambda rate: run(seed, rate), rates)

    def path(seed):
        return epath.Path(tmp_path) / f"{seed}.json"

    records = tuned_seeds(path, 3, (1.0, 2.0, 4.0), at_best)
    assert ran == [(0, 1.0), (0, 2.0), (0, 4.0), (1, 2.0), (2, 2.0)]
    assert [record["lr"] for record in records] == [2.0, 2.0, 2.0]
    path(1).unlink()
    assert tuned_seeds(path, 3, (1.0, 2.0, 4.0), at_best) == records
    assert ran[5:] == [(1, 2.0)]


def test_an_update_that_was_fitted_is_read_and_plans_itself(tmp_path):
    mesh = training.make_mesh("data:2", devices=jax.devices()[:2])

    def loss_fn(params, batch, rng, target):
        error = params["w"] * batch["x"] - target
        return (error**2).sum(), error.size, {}

    schedule = training.Schedule(0.1, warmup=1, total_steps=4)
    update = fit.make_update(loss_fn, schedule, mesh=mesh, weight_decay=0.0)
    seen = []

    def batches(step):
        seen.append(step)
        return {"x": np.ones(4, np.float32)}

    options = dict(steps=4, directory=epath.Path(tmp_path), constants=jnp.ones(()), log_every=2)
    params = fit.fit(update, {"w": jnp.zeros(())}, batches, **options)
    assert seen == [0, 1, 2, 3]
    assert float(params["w"]) > 0
    assert [step for step, _ in fit.curve(epath.Path(tmp_path))] == [2, 4]
    again = fit.fit(update, {"w": jnp.zeros(())}, batches, **options)
    assert seen == [0, 1, 2, 3]
    assert float(again["w"]) == float(params["w"])
    traced = update.program("update", params, batches(0), jnp.ones(())).trace()
    assert traced.out_info[0].params["w"].shape == ()


def test_reports_leave_text_and_a_line_a_record(tmp_path):
    records = [{"arm": "a", "nll": 1.0}, {"arm": "b"}, {"arm": "a", "nll": 3.0}]
    assert list(by_key(records, "arm")) == ["a", "b"]
    assert spread(records, "nll", 10) == "20 +- 14.14"
    assert spread(records, "accuracy") is None
    assert bar("speed", 2.0, ">= 6", False)[""] == "MISSED"
    workdir = epath.Path(tmp_path)
    written = write_report(workdir, "# A", records=records, tables={}, pictures={})
    assert written == (workdir / "report.md").read_text()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
