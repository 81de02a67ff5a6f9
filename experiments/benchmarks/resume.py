"""`logitjax distill` is killed with SIGKILL at a random step and started again: the same bits?"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.benchmarks import _suite

_ARM = Path("train")


def _command(workdir: Path, steps: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "logitjax",
        "distill",
        "--student=tiny",
        "--drop_layers=1",
        "--data=text:LICENSE",
        "--loss=sft:0.5",
        "--loss=kl:0.5",
        "--loss=gld:0.001",
        "--seq_len=64",
        "--cache_top_k=16",
        "--eval_rows=4",
        f"--steps={steps}",
        "--checkpoint_every=7",
        "--log_every=1",
        f"--out={workdir}",
    ]


def _logged_steps(workdir: Path) -> int:
    metrics = workdir / _ARM / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def _final(workdir: Path, steps: int) -> list[np.ndarray]:
    directory = workdir / _ARM / "checkpoints" / str(steps) / "state"
    tree = ocp.PyTreeCheckpointer().restore(directory.resolve())
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(tree)]
    leaves = zip(jax.tree.leaves(tree), keys, strict=True)
    return [np.asarray(jax.random.key_data(leaf) if key else leaf) for leaf, key in leaves]


def run(options: _suite.Options) -> _suite.Result:
    """One run in peace, then ``repeats`` (three when full) that are killed once each."""
    steps = 12 if options.smoke else 60
    kills = 1 if options.smoke else 3
    options.directory.mkdir(parents=True, exist_ok=True)
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    peaceful = options.directory / f"peace-{time.time_ns()}"
    subprocess.run(_command(peaceful, steps), check=True, **quiet)
    expected = _final(peaceful, steps)
    rows = []
    draw = random.Random()
    for i in range(kills):
        workdir = options.directory / f"killed-{i}-{time.time_ns()}"
        victim = draw.randrange(1, steps - 1)
        process = subprocess.Popen(_command(workdir, steps), **quiet)
        while process.poll() is None and _logged_steps(workdir) < victim:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen = _logged_steps(workdir)
        subprocess.run(_command(workdir, steps), check=True, **quiet)
        found = _final(workdir, steps)
        equal = all(a.tobytes() == b.tobytes() for a, b in zip(expected, found, strict=True))
        rows.append({"kill": i, "log lines at the kill": seen, "of": steps, "equal": equal})
    bar = _suite.Bar(
        name="runs whose final state is bitwise equal",
        value=sum(row["equal"] for row in rows),
        limit=kills,
        sense=">=",
    )
    return _suite.Result(rows=rows, bars=[bar])
