"""Table and curves of the replication experiment."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from experiments.replication import train
from experiments.replication.config import Config
from experiments.shared import figures
from experiments.shared.records import by_key
from experiments.shared.report import markdown_table, mean_and_spread, spread, write_report

# What the paper's abstract states, of students of distilGPT2 (6 layers).
PAPER = {
    6: {"perplexity over the teacher's": "+7.31 %", "geometry": "97.6 % (measure not named)"},
    4: {"seconds / teacher's": "-17.1 %", "parameters / teacher's": "-18.1 %"},
}


def write(
    config: Config, scene: train.Scene, records: Sequence[Mapping[str, Any]], workdir: epath.Path
) -> str:
    """Writes `report.md`, `metrics.jsonl` and the plot, and returns the report."""
    teacher = train.teacher_record(scene)
    groups = by_key(records, "arm")
    rows = [_row(name, group, teacher) for name, group in groups.items()]
    recovered = scene.recovered
    parts = [
        "# Replication behind a recovered head\n",
        f"Teacher: {config.teacher_layers} layers, width {config.width}, vocabulary "
        f"{len(scene.text.unigram):,}, {teacher['parameters']:,} parameters, test perplexity "
        f"{math.exp(teacher['nll']):.4g} (unshifted, as the released code logs it, NLL "
        f"{teacher['unshifted_nll']:.4g}). Its head from {recovered['queries']:,} queries of "
        f"log-probabilities with {config.decimals} decimals: width {recovered['width']}, leak "
        f"{recovered['leak']:.4f}, relative rms {recovered['relative_rms']:.2g}. Its own "
        f"states with the nearest head in that subspace: perplexity "
        f"{100 * math.expm1(teacher['nll_behind'] - teacher['nll']):+.3g} %.\n",
        markdown_table(rows),
        "\nPerplexity: of the next token, pads left out, over the teacher's. `R2`: of the last "
        "hidden states after a rotation, centred, on positions that did not fit it; in brackets "
        "the same with the pairing broken. `raw cosine` is the measure that needs the null most.\n",
        _paper(rows),
        "![curves](curves.png)\n",
    ]
    return write_report(
        workdir,
        "\n".join(parts),
        records=[teacher, *records],
        tables={"students": rows},
        pictures={"curves": curves(groups)},
    )


def _row(name: str, group: Sequence[Mapping[str, Any]], teacher: Mapping[str, Any]) -> dict:
    def beside(key: str) -> str:
        null = sum(r[f"null_{key}"] for r in group) / len(group)
        return f"{spread(group, key)} [{null:.3f}]"

    over = [100 * (math.exp(r["nll"] - teacher["nll"]) - 1) for r in group]
    return {
        "student": name,
        "lr": group[0]["lr"],
        "perplexity, %": ("+" if over[0] >= 0 else "") + mean_and_spread(over),
        "unshifted NLL": spread(group, "unshifted_nll"),
        "parameters": group[0]["parameters"] / teacher["parameters"],
        "seconds": spread(group, "seconds"),
        "R2": beside("procrustes_r2"),
        "CKA": beside("cka"),
        "raw cosine": beside("raw_cosine"),
    }


def _paper(rows: Sequence[Mapping[str, Any]]) -> str:
    by_name = {row["student"]: row for row in rows}
    items = []
    for layers, claims in PAPER.items():
        for arm in (f"recovered_{layers}", f"copied_{layers}"):
            row = by_name.get(arm)
            if row is None:
                continue
            ours = {
                "perplexity over the teacher's": f"{row['perplexity, %']} %",
                "geometry": f"R2 {row['R2']}, CKA {row['CKA']}",
                "seconds / teacher's": row["seconds"],
                "parameters / teacher's": f"{100 * (row['parameters'] - 1):+.1f} %",
            }
            items += [
                {"student": arm, "": name, "paper": claim, "here": ours[name]}
                for name, claim in claims.items()
            ]
    return f"## Beside the paper\n\n{markdown_table(items)}\n" if items else ""


def curves(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> figures.Picture:
    """Training losses of the distilled students, and of those that read text alone."""
    distilled, alone = [], []
    for name, group in groups.items():
        if not name.startswith("official"):  # A sum over positions: a different scale.
            series = figures.Series(name=name, runs=[record["curve"] for record in group])
            (alone if name.startswith("scratch") else distilled).append(series)
    return figures.Picture(
        panels=[
            # Behind a recovered head the losses of the first steps are very large.
            figures.Panel(x="step", y="loss, nats", title="distilled", series=distilled, log="y"),
            figures.Panel(x="step", y="cross-entropy, nats", title="on text alone", series=alone),
        ]
    )
