"""Records of healed students: bits a byte of every test row."""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from experiments.claims.claim import Setting
from experiments.claims.record import Record, make
from experiments.graph_fusion import arms


def records(setting: Setting, workdir: pathlib.Path) -> Iterator[Record]:
    """A record for each arm and seed of a run at one number of layers; seed 0 chose, if any did."""
    config = json.loads((workdir / "config.json").read_text())
    for arm in setting.arms:
        paths = sorted(workdir.glob(f"drop-*/{arm}/**/outcome.json"))
        runs = [json.loads(path.read_text()) for path in paths]
        tried = [(_settings(run), run["validation_loss"]) for run in runs if not run["seed"]]
        best = min(range(len(tried)), key=lambda number: tried[number][1], default=0)
        edge = bool(tried) and arms.at_edge(tried[best][0], tried)
        scored = {run["seed"]: run for run in runs if "bits" in run}
        for seed in range(0 if tried else 1, setting.seeds + 1):
            values = np.divide(scored[seed]["bits"], scored[seed]["bytes"]) if seed else []
            yield make(
                setting,
                arm,
                seed,
                {"bits": values} if seed else {},
                units=range(setting.units.n),
                examples=config["steps"] * config["batch_size"] * config["seq_len"],
                updates=config["steps"],
                tried=[-loss for _, loss in tried],
                chosen=best,
                edge=edge,
            )


def _settings(run: dict) -> arms.Settings:
    return arms.Settings(**{name: run[name] for name in ("arm", "learning_rate", "mix", "gld")})
