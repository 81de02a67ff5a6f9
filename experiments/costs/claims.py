"""Records of timings: a seed is a round."""

import json
import pathlib
from collections.abc import Iterator

from experiments.claims.claim import Setting, digest
from experiments.claims.record import Record, digits, names_digest
from experiments.shared.report import environment


def records(setting: Setting, workdir: pathlib.Path) -> Iterator[Record]:
    """A record a case and round: `exponent`, or `faster` than a full head."""
    found = json.loads((workdir / "rounds.json").read_text())
    for arm in setting.arms:
        for number, value in enumerate(found[arm]):
            yield Record(
                arm=arm,
                seed=number,
                role="report",
                setting=digest(setting),
                environment=environment(),
                chosen=0,
                edge=False,
                trials=1,
                updates=0,
                examples=0,
                units=names_digest(["round"]),
                count=1,
                values={setting.contrasts[0].metric: digits([value])},
            )
