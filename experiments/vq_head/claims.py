"""Records of converted heads: logarithms of perplexity over that of the old head."""

import json
import pathlib
from collections.abc import Iterator

from experiments.claims.claim import Setting
from experiments.claims.record import Record, make


def records(setting: Setting, workdir: pathlib.Path) -> Iterator[Record]:
    """A record of `ARM@CODES` and seed of a finished run; the first of each chose the rate."""
    config = json.loads((workdir / "config.json").read_text())

    def run(arm: str, codes: int, seed: int) -> dict:
        return json.loads((workdir / "results" / f"{arm}_{codes}_{seed}.json").read_text())

    for name in setting.arms:
        arm, _, codes = name.partition("@")
        tried = run(arm, config["codes"][0], 0)
        rates = sorted(tried["tried"], key=float)
        losses = [tried["tried"][rate] for rate in rates]
        best = losses.index(min(losses))
        for seed in range(setting.seeds + 1):
            values = run(arm, int(codes), seed)["records"][0]["log_factors"]
            yield make(
                setting,
                name,
                seed,
                {"log_factor": values},
                units=range(len(values)),
                examples=setting.updates * config["batch_size"],
                tried=[-loss for loss in losses],
                chosen=best,
                edge=best in (0, len(losses) - 1),
            )
