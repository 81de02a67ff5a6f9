"""The audit's table, plots and verdict."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments.leakage_audit.config import Config
from experiments.leakage_audit.data import Rows
from experiments.shared.records import by_key
from experiments.shared.report import bar, markdown_table, save_figure, spread, write_report
from logitjax import leakage


def verdict(group: Sequence[Mapping[str, Any]], width: int) -> str:
    """What an operator should take from it."""
    first = group[0]
    if "row_error" in first:
        row = first["row_error"], first["row_queries"], first["row_coverage"]
        return leakage.verdict(first["leak"], row=row)
    leak = sum(record["leak"] for record in group) / len(group)
    return leakage.verdict(leak, loss=first["kl"], sees_width=first.get("estimate") == width)


def write(
    config: Config, rows: Rows, records: Sequence[Mapping[str, Any]], workdir: epath.Path
) -> str:
    """Writes `report.md`, `metrics.jsonl` and the plots, and returns the report."""
    groups = by_key(records, "policy")
    table = [_row(name, group, rows.width) for name, group in groups.items()]
    random = np.random.default_rng(0).standard_normal(rows.head.shape)
    control = leakage.align_head(random, rows.head)
    per_row = leakage.row_queries(rows.vocab, 5)
    parts = [
        "# Leakage audit\n",
        f"`{config.model}`: vocabulary {rows.vocab:,}, hidden width {rows.width}; "
        f"{len(rows.prompts)} prompts of {config.prompt_length} tokens from `{config.data}`.\n",
        markdown_table(table),
        f"\n`leak`: mean squared cosine between the recovered and the true subspace beyond chance "
        f"({control.chance:.3g}); a random subspace scores {control.leak:.2g}. `rms`: what least "
        "squares leaves of the head. Where the largest gap and the estimate differ, the published "
        "rule would have been wrong. `KL`, `top-1`: what honest users lose.\n",
        "## Verdict\n",
        "\n".join(f"- `{name}`: {verdict(group, rows.width)}." for name, group in groups.items()),
        "\n## The paper's numbers\n",
        "The paper reports that a 6-layer student recreates 97.6 % of the hidden-state geometry "
        "after fewer than 10,000 queries for top-k logits; its tables were not to be had. With the "
        f"top 5 and a bias a row of this model takes {per_row:,} queries, so 10,000 queries give "
        f"{10_000 // per_row:,} of the {rows.width + 1:,} rows that show its width.\n",
    ]
    bars = _bars(groups, rows)
    if bars:
        parts += ["## Bars\n", markdown_table(bars), ""]
    for path in (_plot_spectra(groups, rows, workdir), _plot_frontier(groups, workdir)):
        parts.append(f"![{path.stem}]({path.name})\n")
    return write_report(workdir, "\n".join(parts), records)


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
    found: list[dict[str, Any]] = []

    def add(name: str, seen: Any, promised: str, met: bool) -> None:
        found.append(bar(name, seen, promised, met))

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
        error, price = record["row_error"], leakage.row_queries(rows.vocab, 5)
        add("top 5 and bias: error over 25 nats", error, "<= 5e-06", error <= 5e-6)
        count, far = record["row_queries"], record["row_far"]
        again = -(-far // 4)
        name = f"top 5 and bias: queries, {far} tokens over 30 nats down twice"
        add(name, count, f"<= {price} + {again}", count <= price + again)
    return found


def _plot_spectra(groups: Mapping[str, Any], rows: Rows, workdir: epath.Path) -> epath.Path:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.4), constrained_layout=True)
    colours = plt.get_cmap("turbo")
    shown = {name: group[0] for name, group in groups.items() if "spectrum" in group[0]}
    for number, (name, record) in enumerate(shown.items()):
        step = max(1, record["prompts"] // 500)
        places = [1 + i * step for i in range(len(record["spectrum"]))]
        colour = colours((number + 0.5) / len(shown))
        axis.plot(places, record["spectrum"], label=name, linewidth=1, color=colour)
    axis.axvline(rows.width, color="black", linewidth=0.8, linestyle=":")
    axis.set(yscale="log", xlabel="singular value", ylabel="size", title="spectra of the rows")
    axis.legend(fontsize=7, ncols=2)
    return save_figure(figure, workdir / "spectra.png")


def _places(groups: Mapping[str, Any]) -> list[tuple[float, float, list[str]]]:
    """Loss and leak of policies; those whose labels would lie on each other share a place."""
    found: list[tuple[float, float, list[str]]] = []
    for name, group in groups.items():
        if any(record.get(key) is None for record in group for key in ("kl", "leak")):
            continue  # A row came back, but no subspace was asked for.
        x = max(1e-6, sum(r["kl"] for r in group) / len(group))
        y = sum(r["leak"] for r in group) / len(group)
        for other_x, other_y, names in found:
            if abs(math.log10(x / other_x)) < 0.5 and abs(y - other_y) < 0.025:
                names.append(name)
                break
        else:
            found.append((x, y, [name]))
    return found


def _plot_frontier(groups: Mapping[str, Any], workdir: epath.Path) -> epath.Path:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.4), constrained_layout=True)
    for x, y, names in _places(groups):
        axis.scatter(x, y, s=18, color="tab:blue")
        label = ", ".join(names)
        axis.annotate(label, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
    # Room for the labels of what costs most.
    axis.set(
        xscale="log",
        xlim=(5e-7, 200.0),
        xlabel="KL to the true distribution, nats (users' loss)",
        ylabel="leak",
        title="defences: down is safe, left is cheap",
    )
    return save_figure(figure, workdir / "frontier.png")
