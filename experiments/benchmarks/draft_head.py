"""Drafts of a trained head beside plain decoding, one held-out prompt at a time.

    logitjax distill --draft_head --student=smollm2 --data=tfds:wiki_summaries --out=runs/draft
    python -m experiments.benchmark draft_head --only=runs/draft

Prompts are the first quarter of test rows, continued to the rows' length: by the most likely
tokens, and by tokens drawn at temperature 1.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import suite
from logitjax import data, decoding, models


def run(options: suite.Options) -> suite.Result:
    smoke = options.smoke
    model, _ = models.load("tiny" if smoke else "smollm2", layout="listed")
    if smoke:
        model = models.with_layout(model, "listed")
        head, rows = models.DraftHead.of(model), np.arange(48).reshape(3, 16)
    else:
        folder = Path(options.only)
        head = models.DraftHead.load(folder / "model", model.config)
        test = data.PackedDataset(folder / "data" / "test")
        rows = test.rows(range(4 * options.repeats))[test.names[0]]["tokens"]
    length, table = rows.shape[1], []
    lengths = (2,) if smoke else (2, 3, 5, 8)
    for name, temperature in (("most likely", 0.0), ("drawn", 1.0)):
        controls = {0: None, **{n: decoding.DraftControl(head, n) for n in lengths}}
        seconds: dict[int, list[float]] = {n: [] for n in controls}
        outs: dict[int, list[Any]] = {n: [] for n in controls}
        # The first prompt twice, since it compiles.
        for i, row in enumerate([rows[0], *rows]):
            sampling = decoding.Sampling(temperature=temperature, seed=i)
            given: Any = dict(max_new_tokens=length - length // 4, sampling=sampling)
            for n, control in controls.items():
                begin = time.perf_counter()
                out = decoding.generate(model, row[: length // 4], **given, drafts=control)
                if i:
                    seconds[n].append(time.perf_counter() - begin)
                    outs[n].append(out)
        for n in lengths:
            counts = [out.drafting for out in outs[n]]
            rounds, accepted = (
                sum(int(getattr(one, part).sum()) for one in counts)
                for part in ("rounds", "accepted")
            )
            same = [(a.tokens == b.tokens).all() for a, b in zip(outs[0], outs[n], strict=True)]
            table.append({
                "tokens": name, "drafts": n, "tokens a verification": 1 + accepted / rounds,
                "seconds": sum(seconds[n]), "plain": sum(seconds[0]),
                "speed-up": sum(seconds[0]) / sum(seconds[n]), "rows as plain": int(sum(same)),
            })  # fmt: skip
    best = max(row["tokens a verification"] for row in table if row["tokens"] == "most likely")
    bars = [] if smoke else [suite.at_least("tokens a verification, most likely", best, 2.5)]
    return suite.Result(rows=table, bars=bars)
