"""Records of converted heads: logarithms of perplexity over that of the old head."""

import json
import pathlib
from collections.abc import Iterator

from experiments.claims.claim import Setting, digest
from experiments.claims.record import Record, digits, names_digest
from experiments.shared.report import environment


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
            yield Record(
                arm=name,
                seed=seed,
                role="report" if seed else "trial",
                setting=digest(setting),
                environment=environment(),
                validation=[] if seed else digits([-loss for loss in losses]),
                chosen=best,
                edge=best in (0, len(losses) - 1),
                trials=len(losses),
                updates=setting.updates,
                examples=setting.updates * config["batch_size"],
                units=names_digest(range(len(values))),
                count=len(values),
                values={"log_factor": digits(values)},
            )
