"""Records of forgetting methods: the share of probability left on rows to keep, by row."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.claims.claim import Setting
from experiments.claims.record import Record, make

_LEAST = 0.98


def records(setting: Setting, workdir: pathlib.Path) -> Iterator[Record]:
    """A record for each method and seed; the first seed chose the rate that keeps most at the goal.

    `kept` is a row's part of the mean probability, less .98 of its part before unlearning.
    """

    def part(name: str) -> dict[str, Any]:
        return json.loads((workdir / "parts" / f"{name}.json").read_text())

    before = np.array(part("target")["examined"]["probabilities"]["test"])
    for arm in setting.arms:
        tried = part(f"{arm}-0")["tried"]
        scores = [one["candidates"][-1]["probability"] for one in tried]
        best = max(range(len(scores)), key=scores.__getitem__)
        rates = [one["rate"] for one in tried]
        for seed in range(setting.seeds + 1):
            run = part(f"{arm}-{seed}")
            after = np.array(run["examined"]["probabilities"]["test"])
            kept = (after - _LEAST * before) / before.mean()
            yield make(
                setting,
                arm,
                seed,
                {"kept": kept},
                units=range(len(kept)),
                # Four rows to forget and four to keep in a step.
                examples=8 * run["shown"]["step"],
                updates=run["shown"]["step"],
                tried=scores,
                chosen=best,
                edge=rates[best] in (min(rates), max(rates)),
            )
