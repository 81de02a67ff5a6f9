"""Four processes on loopback beside one process with as many devices, and beside one device.

Each job trains tiny models from beginning to end in all three settings; its losses have to be the
same. Differences are relative to the loss, or to 1 where it is less: a divergence near 0 is what is
left of terms near log V, and has their rounding.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from experiments.shared import suite
from tests.rigs import _jobs

_SMOKE = {"2 processes x 2 devices": (2, 2), "1 device": (1, 1)}
_SETTINGS = {"4 processes x 2 devices": (4, 2), "1 x 8": (1, 8), "1 device": (1, 1)}


@dataclasses.dataclass(frozen=True)
class _Job:
    """An experiment, its flags (with ``{steps}`` and the like filled in), and where losses are."""

    arguments: str
    losses: Callable[[Path], list[float]]
    mesh: str = "data:-1"


def _logged(workdir: Path) -> list[float]:
    logged: list[float] = []
    for path in sorted(workdir.glob("*/**/metrics.jsonl")):
        records = map(json.loads, path.read_text().splitlines())
        logged += [record["loss"] for record in records if "loss" in record]
    return logged


def _curves(workdir: Path) -> list[float]:
    """Of converted heads, and of models from scratch, whose points also name their step."""
    points: list[float] = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        curve = json.loads(line)["curve"]
        points += [point[1] if isinstance(point, list) else point for point in curve]
    return points


_JOBS = {
    "graph_fusion": _Job(
        "--loss=uld+gld --steps={steps} --batch_size=8 --eval_batch=8 --eval_rows=8 --log_every=1",
        _logged,
        "data:-1,fsdp:2",
    ),
    "vq_head": _Job(
        "--arm=vq_bias --steps={steps} --scratch_arm=full_bias --scratch_arm=vq_bias "
        "--scratch_steps={steps} --scratch_batch=8",
        _curves,
    ),
    # At a fiftieth of the preset's rates. Where an input of a rectifier is within rounding of 0,
    # settings may take different sides, and gradients of that channel differ by percents; how much
    # of it losses show grows with the rate. (In float64 eight devices equal one:
    # tests/experiments/test_dual_head.py.)
    "dual_head": _Job(
        "--arm=kd --arm=dual_mlp_aligned --train_examples={examples} --learning_rate=0.001 "
        "--teacher_learning_rate=0.001",
        _logged,
    ),
}


def _run(name: str, workdir: Path, processes: int, devices: int, steps: int) -> list[float]:
    job = _JOBS[name]
    mesh = job.mesh if processes * devices > 1 else "data:1"
    filled = {"steps": steps, "examples": 32 * steps // 2}
    flags = (f"--mesh={mesh}", f"--workdir={workdir}", *job.arguments.format(**filled).split())
    command = _jobs.module(f"experiments.{name}", "--preset=smoke", *flags)
    workdir.mkdir(parents=True)
    _jobs.finish(_jobs.local(processes, devices, command), workdir.with_suffix(".log"))
    return job.losses(workdir)


def run(options: suite.Options) -> suite.Result:
    """The whole jobs, from packing to scores, in all settings."""
    steps = 4 if options.smoke else 20
    jobs = ("graph_fusion",) if options.smoke else tuple(_JOBS)
    settings = _SMOKE if options.smoke else _SETTINGS
    directory = _jobs.fresh(options)
    rows, bars = [], []
    for name in jobs:
        by_setting = {}
        for setting, shape in settings.items():
            workdir = directory / name / setting.replace(" ", "-")
            by_setting[setting] = _run(name, workdir, *shape, steps)
        one = by_setting["1 device"]
        worst = 0.0
        for setting, losses in by_setting.items():
            gaps = [abs(a - b) / max(abs(b), 1.0) for a, b in zip(losses, one, strict=True)]
            worst = max(worst, *gaps)
            rows.append(
                {
                    "experiment": name,
                    "setting": setting,
                    "losses": len(losses),
                    "first": losses[0],
                    "last": losses[-1],
                    "largest relative difference": max(gaps),
                }
            )
        bars.append(suite.at_most(f"{name}: largest difference", worst, 1e-5))
    return suite.Result(rows=rows, bars=bars)
