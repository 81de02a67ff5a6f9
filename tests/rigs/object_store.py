"""Every experiment's smoke preset on an emulated object store: killed, resumed, read again."""

import contextlib
import random
import time
from pathlib import Path
from typing import Any

from experiments.shared import suite
from tests.rigs import _jobs
from tests.rigs._object_store import Store

# Models that are built, and text that is in the repository: nothing is fetched.
_EXPERIMENTS = tuple(
    sorted(path.parent.name for path in (suite.ROOT / "experiments").glob("*/config.py"))
)
_BUCKET = "bucket"


def _one(name: str, store: Store, directory: Path, draw: random.Random) -> dict[str, Any]:
    """Killed once somewhere after it has begun to write, then run to its end, then once more."""
    log, workdir = directory / f"{name}.log", f"--workdir=gs://{_BUCKET}/{name}"
    command = _jobs.module(f"experiments.{name}", "--preset=smoke", workdir)
    variables = store.variables() | {"LOGITJAX_RUN": name}
    begin = time.monotonic()
    process = _jobs.start(command, log, **variables)
    while process.poll() is None and not store.names(_BUCKET, f"{name}/config.json"):
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, 8.0))
    killed = process.poll() is None
    process.kill()
    process.wait()
    locked = f"{name}/lock" in store.names(_BUCKET)
    status = _jobs.start(command, log, **variables).wait()
    seconds = time.monotonic() - begin
    again = _jobs.start(command, log, **variables).wait()
    names = store.names(_BUCKET, f"{name}/")
    return {
        "experiment": name,
        "killed": killed,
        "lock left by the kill": locked,
        "status": status,
        "again": again,
        "report": f"{name}/report.md" in names,
        "objects": len(names),
        "checkpoints": len({n.rpartition("/state/")[0] for n in names if "/state/" in n}),
        "lock": f"{name}/lock" in names,
        "seconds": round(seconds, 1),
    }


def run(options: suite.Options) -> suite.Result:
    """One experiment at the smoke scale, all of them at the full one."""
    few = options.smoke and not options.only
    names = _EXPERIMENTS[3:4] if few else options.parts(_EXPERIMENTS)
    directory = _jobs.fresh(options)
    draw = random.Random(time.time_ns())
    with contextlib.closing(Store()) as store:
        rows = [_one(name, store, directory, draw) for name in names]
    good = [
        row["status"] == row["again"] == 0 and row["report"] and not row["lock"] for row in rows
    ]
    bars = [suite.at_least("experiments that ended well", sum(good), len(rows))]
    return suite.Result(rows=rows, bars=bars)
