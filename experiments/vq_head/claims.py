"""Records of heads: log perplexity over the old head's, or NLL of models from scratch."""

import json
import pathlib
from collections.abc import Iterator

from experiments.claims.claim import Setting
from experiments.claims.record import Record, make


def records(setting: Setting, workdir: pathlib.Path) -> Iterator[Record]:
    """A record of `ARM@CODES`, or of an arm from scratch, and seed; the first chose the rate."""
    config = json.loads((workdir / "config.json").read_text())

    def run(name: str, seed: int) -> dict:
        return json.loads((workdir / "results" / f"{name}_{seed}.json").read_text())

    positions = {True: config["batch_size"], False: config["scratch_batch"] * config["seq_len"]}
    for name in setting.arms:
        arm, _, codes = name.partition("@")
        tried = run(f"{arm}_{config['codes'][0]}" if codes else f"scratch_{arm}", 0)
        rates = sorted(tried["tried"], key=float)
        losses = [tried["tried"][rate] for rate in rates]
        best = losses.index(min(losses))
        for seed in range(setting.seeds + 1):
            if codes:
                values = run(f"{arm}_{codes}", seed)["records"][0]["log_factors"]
            else:
                values = run(f"scratch_{arm}", seed)["units"]
            yield make(
                setting,
                name,
                seed,
                {setting.contrasts[0].metric: values},
                units=range(len(values)),
                examples=setting.updates * positions[bool(codes)],
                tried=[-loss for loss in losses],
                chosen=best,
                edge=best in (0, len(losses) - 1),
            )
