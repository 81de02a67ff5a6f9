"""Records of forgetting methods: what is left of rows to keep, and answers to rows to forget."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments.claims.claim import Setting
from experiments.claims.record import Record, make
from experiments.forgetting.run import standing

_LEAST = 0.98


def records(setting: Setting, workdir: pathlib.Path) -> Iterator[Record]:
    """A record for each method and seed; the first seed chose the rate that keeps most at the goal.

    `kept` is a row's part of the mean probability, less .98 of its part before unlearning. Of the
    answers to rows to forget, if these are the units, `entropy` is that of words, beside the mean
    before, and `nats` those of a token by the model that was never taught.
    """

    def part(name: str) -> dict[str, Any]:
        return json.loads((workdir / "parts" / f"{name}.json").read_text())

    target = part("target")
    before = np.array(target["examined"]["probabilities"]["test"])
    for arm in setting.arms:
        tried = part(f"{arm}-0")["tried"]
        scores = [_score(one) for one in tried]
        best = max(range(len(scores)), key=scores.__getitem__)
        rates = [one["rate"] for one in tried]
        for seed in range(setting.seeds + 1):
            run = part(f"{arm}-{seed}")
            after = np.array(run["examined"]["probabilities"]["test"])
            values: dict[str, Any] = {"kept": (after - _LEAST * before) / before.mean()}
            if setting.units.of == "answer":
                values = {name: np.array(run["written"][name]) for name in ("entropy", "nats")}
                values["entropy"] /= np.mean(target["written"]["entropy"])
            yield make(
                setting,
                arm,
                seed,
                values,
                units=range(setting.units.n),
                # Four rows to forget and sixteen to keep in a step.
                examples=20 * run["shown"]["step"],
                updates=run["shown"]["step"],
                tried=scores,
                chosen=best,
                edge=rates[best] in (min(rates), max(rates)),
            )


def _score(trial: Mapping[str, Any]) -> float:
    """A trial's place in the run's order: feasible, at the goal by what it keeps, then nearness."""
    shown = trial["candidates"][-1]
    if "finite" in shown["broken"]:
        return -1e9
    chosen, met, value = standing(shown, chosen=trial["chosen"] is not None)
    return value + met + chosen
