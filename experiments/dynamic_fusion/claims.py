"""Records of fused experts: points of the gap, NLL and right answers of every unit."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.claims.claim import Setting
from experiments.claims.record import Record, make


def records(setting: Setting, workdir: pathlib.Path) -> Iterator[Record]:
    """A record for each arm and seed of a finished part; seed 0 was scored on validation data.

    `gap` is a unit's share of the distance from the large model's mean NLL to that of the tuned
    one, in percent. Where two parts share a merged model, their mean gap chooses.
    """
    config = json.loads((workdir / "config.json").read_text())
    metric = setting.contrasts[0].metric
    part = setting.records.removeprefix("dynamic_fusion_")
    # As many tokens as the questions of the other expert have.
    examples = config["tune_steps"] * config["batch_size"] * config["seq_len"]

    def values(part: str, seed: int) -> dict[str, np.ndarray]:
        stored = json.loads((workdir / "results" / f"{part}-{seed}.json").read_text())
        # The file has a checksum as well.
        arms = {arm: one for arm, one in stored.items() if isinstance(one, dict)}
        if metric != "gap":
            return {arm: np.array(one[metric]) for arm, one in arms.items()}
        large, ceiling = (np.array(arms[name]["nll"]) for name in ("large", "ceiling"))
        gap = (large.mean() - ceiling.mean()) / 100
        return {arm: (large - one["nll"]) / gap for arm, one in arms.items()}

    # The weight of merging is chosen for both data sets at once.
    both = [one for one in config["part"] if one.startswith("both_")]
    shared = both if part in both else [part]
    chosen = [values(one, 0) for one in shared] if metric != "nll" else []
    for arm in setting.arms:
        tried: Any = [np.mean([one[arm].mean() for one in chosen])] if chosen else ()
        for seed in range(0 if chosen else 1, config["seeds"]):
            scored: Any = {metric: values(part, seed)[arm]} if seed else {}
            units = range(setting.units.n)
            yield make(setting, arm, seed, scored, units=units, examples=examples, tried=tried)
