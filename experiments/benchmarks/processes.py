"""Two processes on loopback, data x fsdp, beside one process with the same devices: same losses?"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from experiments.benchmarks import _suite

_ROOT = Path(__file__).parents[2]
_ARM = Path("arms/uld+gld/rank-row_sum-closed_form-x0.002/lr-0.01/seed-0")


def _run(workdir: Path, processes: int, devices: int, steps: int) -> list[float]:
    arguments = [
        "-m",
        "experiments.graph_fusion",
        "--preset=smoke",
        "--loss=uld+gld",
        f"--steps={steps}",
        "--batch_size=4",
        "--log_every=1",
        "--mesh=data:2,fsdp:2",
        f"--workdir={workdir}",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", "launch/local.sh", str(processes), str(devices), sys.executable, *arguments],
        check=True,
        cwd=_ROOT,
        env={**os.environ, "PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    lines = (workdir / _ARM / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def run(options: _suite.Options) -> _suite.Result:
    """Graph fusion of tiny models: the whole job, from packing to scores, in both settings."""
    steps = 4 if options.smoke else 20
    options.directory.mkdir(parents=True, exist_ok=True)
    directory = options.directory.resolve() / f"run-{time.time_ns()}"
    one = _run(directory / "one", 1, 4, steps)
    two = _run(directory / "two", 2, 2, steps)
    rows = [
        {
            "step": i + 1,
            "1 process x 4 devices": a,
            "2 x 2": b,
            "relative difference": abs(a - b) / a,
        }
        for i, (a, b) in enumerate(zip(one, two, strict=True))
    ]
    worst = max(row["relative difference"] for row in rows)
    bar = _suite.Bar(name=f"largest difference over {steps} steps", value=worst, limit=1e-5)
    return _suite.Result(rows=rows, bars=[bar])
