"""Records of an audit: the share of the head in the rows that 10,000 queries pay for."""

import json
import pathlib
from collections.abc import Iterator

import numpy as np
from etils import epath

from experiments.claims.claim import Setting
from experiments.claims.record import Record, make
from experiments.leakage_audit import data
from experiments.leakage_audit.config import Config
from logitjax import leakage
from logitjax.commands import cli

_QUERIES = 10_000


def records(setting: Setting, workdir: pathlib.Path) -> Iterator[Record]:
    """A record for each number of reported logits and draw of prompts.

    `top_K` gives whole rows through a bias, exactly and at the price of `LogitPolicy.row_queries`;
    `full` gives a row a query. The unit is the head.
    """
    config = cli.build(Config, json.loads((workdir / "config.json").read_text()))
    rows = data.load(config, epath.Path(workdir))
    for arm in setting.arms:
        reported = int(arm.removeprefix("top_")) if arm != "full" else rows.vocab
        price = leakage.LogitPolicy(top_k=reported).row_queries(rows.vocab) if arm != "full" else 1
        count = min(_QUERIES // price, len(rows.prompts))
        for seed in range(1, setting.seeds + 1):
            drawn = np.random.default_rng(seed).permutation(len(rows.prompts))[:count]
            array = rows.logits[drawn].astype(np.float64)
            # A row is known up to its normaliser; without rows nothing is known.
            basis = (array - array.mean(1, keepdims=True)).T
            leak = leakage.align_head(basis, rows.head).leak if count else 0.0
            yield make(setting, arm, seed, {"leak": [leak]}, units=["head"], examples=_QUERIES)
