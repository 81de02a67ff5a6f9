"""The audit's table, plots and verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments.leakage_audit.config import Config
from experiments.leakage_audit.data import Rows
from experiments.shared import figures
from experiments.shared.records import by_key
from experiments.shared.report import bar, markdown_table, spread, write_report
from logitjax import leakage

# Least number of points of a spectrum in a picture.
_POINTS = 150


def write(
    config: Config, rows: Rows, records: Sequence[Mapping[str, Any]], workdir: epath.Path
) -> str:
    """Writes `report.md`, `metrics.jsonl` and the plots, and returns the report."""
    groups = by_key(records, "policy")
    table = [_row(name, group, rows.width) for name, group in groups.items()]
    random = np.random.default_rng(0).standard_normal(rows.head.shape)
    control = leakage.align_head(random, rows.head)
    per_row = leakage.LogitPolicy(top_k=5).row_queries(rows.vocab)
    parts = [
        "# Leakage audit\n",
        f"`{config.model}`: vocabulary {rows.vocab:,}, hidden width {rows.width}; "
        f"{len(rows.prompts)} prompts of {config.prompt_length} tokens from `{config.data}`.\n",
        markdown_table(table),
        f"\n`leak`: mean squared cosine between the recovered and the true subspace beyond chance "
        f"({control.chance:.3g}); a random subspace scores {control.leak:.2g}. `rms`: residual of "
        "the head after least squares. If the largest gap and the estimate differ, the published "
        "rule would have been wrong. `KL`, `top-1`: honest users' loss.\n",
        "## Verdict\n",
        "\n".join(f"- `{name}`: {group[0]['verdict']}." for name, group in groups.items()),
        "\n## The paper's numbers\n",
        "The paper reports that a 6-layer student recreates 97.6 % of the hidden-state geometry "
        "after fewer than 10,000 queries for top-k logits; its tables were not available. With the "
        f"top 5 and a bias a row of this model takes {per_row:,} queries, so 10,000 queries give "
        f"{10_000 // per_row:,} of the {rows.width + 1:,} rows that show its width.\n",
    ]
    bars = _bars(groups, rows)
    if bars:
        parts += ["## Bars\n", markdown_table(bars), ""]
    pictures = {"spectra": spectra(groups, rows.width), "frontier": frontier(groups)}
    parts += [f"![{name}]({name}.png)\n" for name in pictures]
    text = "\n".join(parts)
    tables = {"policies": table}
    return write_report(workdir, text, records=records, tables=tables, pictures=pictures)


def _row(name: str, group: Sequence[Mapping[str, Any]], width: int) -> dict[str, Any]:
    return {
        "policy": name,
        "width": ", ".join(dict.fromkeys(r["width"] for r in group if "width" in r)) or None,
        "largest gap": spread(group, "max_gap"),
        "leak": spread(group, "leak"),
        "rms": spread(group, "relative_rms"),
        "queries": group[0]["queries"],
        "values": group[0]["values"],
        "KL": spread(group, "kl"),
        "top-1": spread(group, "top1"),
        "top-5": spread(group, "top5"),
    }


def _bars(groups: Mapping[str, Any], rows: Rows) -> list[dict[str, Any]]:
    if rows.vocab < 10_000:
        return []  # A smoke run's model is too small for them.
    bars: list[dict[str, Any]] = []

    def add(name: str, seen: Any, promised: str, met: bool) -> None:
        bars.append(bar(name, seen, promised, met))

    for record in groups.get("round_2", [])[:1]:
        exact = record["estimate"] == rows.width
        add("2 decimals: width", record["width"], f"= {rows.width}", exact)
        rms = record["relative_rms"]
        add("2 decimals: relative rms", rms, "<= 0.01", rms <= 0.01)
    for record in groups.get("noise_0.3", [])[:1]:
        off = abs((record["estimate"] or 0) / rows.width - 1)
        add("noise 0.3: estimate off by", off, "<= 0.02", off <= 0.02)
        wrong = abs(record["max_gap"] / rows.width - 1)
        add("noise 0.3: largest gap off by", wrong, "> 0.02", wrong > 0.02)
    for record in groups.get("top_5_bias", [])[:1]:
        error, price = record["row_error"], leakage.LogitPolicy(top_k=5).row_queries(rows.vocab)
        add("top 5 and bias: error over 25 nats", error, "<= 5e-06", error <= 5e-6)
        count, far = record["row_queries"], record["row_far"]
        again = -(-far // 4)
        name = f"top 5 and bias: queries, {far} tokens over 30 nats down twice"
        add(name, count, f"<= {price} + {again}", count <= price + again)
    return bars


def spectra(groups: Mapping[str, Any], width: int) -> figures.Picture:
    """Singular values under each policy; those of an honest one drop at the width."""
    series = []
    for name, group in groups.items():
        if "spectrum" in group[0]:
            step = max(1, group[0]["prompts"] // 500)
            values = [(1 + i * step, value) for i, value in enumerate(group[0]["spectrum"])]
            points = values[:: max(1, len(values) // _POINTS)]
            series.append(figures.Series(name=name, runs=[points]))
    panel = figures.Panel(
        x="number of the singular value",
        y="singular value of the rows",
        log="y",
        series=series,
        marks={f"width {width}": width},
        height=4.0,
    )
    return figures.Picture(panels=[panel])


def frontier(groups: Mapping[str, Any]) -> figures.Picture:
    """Plot the leak against honest users' loss: down is safe, left is cheap."""
    series = []
    for name, group in groups.items():
        if any(record.get(key) is None for record in group for key in ("kl", "leak")):
            continue  # A row came back, but no subspace was requested.
        runs = [[(max(1e-6, record["kl"]), record["leak"])] for record in group]
        series.append(figures.Series(name=name, runs=runs, line=False))
    panel = figures.Panel(
        x="KL to the true distribution, nats (users' loss)",
        y="leak, share of the head's subspace",
        log="x",
        series=series,
        names="beside",
        height=4.0,
    )
    return figures.Picture(panels=[panel])
