"""Records of timings: a seed is a round."""

import json
import pathlib
from collections.abc import Iterator

from experiments.claims.claim import Setting
from experiments.claims.record import Record, make


def records(setting: Setting, workdir: pathlib.Path) -> Iterator[Record]:
    """A record for each case and round: `exponent`, or `faster` than a full head."""
    record = json.loads((workdir / "rounds.json").read_text())
    for arm in setting.arms:
        for number, value in enumerate(record[arm]):
            metric = setting.contrasts[0].metric
            yield make(setting, arm, number, {metric: [value]}, units=["round"], examples=0)
