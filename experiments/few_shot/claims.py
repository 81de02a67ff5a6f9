"""Records of few-shot runs: accuracies of every sample, the mean over numbers of shots."""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from experiments.claims.claim import Setting
from experiments.claims.record import Record, make


def records(setting: Setting, workdir: pathlib.Path) -> Iterator[Record]:
    """A record for each arm and sample of a finished run with one data set and nothing to choose.

    Units are the parts of the test pictures; if samples have tests of their own, the samples.
    """
    config = json.loads((workdir / "config.json").read_text())
    (location,) = (workdir / "results").iterdir()
    for arm in setting.arms:
        paths = [location / f"{arm}_{shots}.json" for shots in config["shots"]]
        runs = [json.loads(path.read_text()) for path in paths]
        parts = [run["parts"] or np.array(run["test"])[:, None] for run in runs]
        updates = sum(run["updates"] for run in runs)
        for sample, values in enumerate(np.mean(parts, 0)):
            yield make(
                setting,
                arm,
                sample,
                {"right": values},
                units=range(len(values)),
                updates=updates,
                examples=updates * config["batch_size"],
            )
