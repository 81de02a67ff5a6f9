"""Tables, paired tests and plots of the dual-head experiment."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments.dual_head import diagnostics
from experiments.dual_head.config import Config
from experiments.shared import figures
from experiments.shared.report import markdown_table, mean_and_spread, paired, write_report

# Top-1 accuracy on CIFAR-100 that the READMEs of mdistiller and LSKD print (teacher, student).
PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    ("resnet56", "resnet20"): dict(T=72.34, ce=69.06, kd=70.66, dkd=71.97, kd_standardized=71.43),
    ("resnet110", "resnet32"): dict(T=74.31, ce=71.14, kd=73.08, dkd=74.11, kd_standardized=74.17),
    ("resnet110", "resnet20"): dict(T=74.31, ce=69.06, kd=70.67, dkd=71.06, kd_standardized=71.48),
    ("resnet32x4", "resnet8x4"): dict(
        T=79.42, ce=72.50, kd=73.33, dkd=76.32, kd_standardized=76.62
    ),
    ("imagenet_resnet34", "imagenet_resnet18"): dict(kd=71.03, dkd=71.70),
}


def best_alpha(records: Sequence[Mapping[str, Any]]) -> float:
    """The alpha with the highest validation accuracy of the first seed.

    Raises:
        ValueError: No alpha has an accuracy that is a number.
    """
    validation = np.array(records[0]["validation"], np.float64)
    if np.isnan(validation).all():
        raise ValueError(f"validation: expected an accuracy of some alpha, got {validation}")
    return records[0]["alphas"][int(np.nanargmax(validation))]


def reported(records: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The seeds that chose nothing; with a single seed, that one."""
    return records[1:] or records


def at(record: Mapping[str, Any], alpha: float, name: str = "test") -> float:
    """A number of a record at an alpha, with the rate that was best there on validation data."""
    lanes = [lane for lane, value in enumerate(record["alphas"]) if value == alpha]
    return record[name][max(lanes, key=lambda lane: record["validation"][lane])]


def tested(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Test accuracies by seed at the chosen alpha."""
    alpha = best_alpha(records)
    return [at(record, alpha) for record in reported(records)]


def at_edge(record: Mapping[str, Any], name: str, value: float) -> bool:
    """Whether a choice is at the edge of the values tried."""
    values = sorted(set(record.get(name) or ()))
    return len(values) > 2 and value in (values[0], values[-1])


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def summarise(config: Config, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row an arm, at its best alpha."""
    arms = results["arms"]
    tests = {name: tested(records) for name, records in arms.items()}
    published = PUBLISHED.get((config.teacher, config.student), {})
    rows = []
    for name, records in arms.items():
        alpha = best_alpha(records)
        validation = [at(record, alpha, "validation") for record in reported(records)]
        row: dict[str, Any] = {"arm": name, "alpha": _choice(records[0], "alphas", alpha)}
        if len(set(records[0].get("rates", ()))) > 1:
            row["rate"] = _choice(records[0], "rates", at(records[0], alpha, "rates"))
        row |= {
            "validation %": mean_and_spread(_percent(validation)),
            "test %": mean_and_spread(_percent(tests[name])),
        }
        for other in ("ce", "kd", "single"):
            if other in tests and other != name:
                gain, p = paired(tests[name], tests[other])
                row[f"vs {other}"] = f"{100 * gain:+.2f}" + (
                    "" if math.isnan(p) else f" (p={p:.2g})"
                )
        if published:
            row["published %"] = published.get(name)
        rows.append(row)
    return rows


def _choice(record: Mapping[str, Any], name: str, value: float) -> str:
    return f"{value:.3g}{' (edge)' if at_edge(record, name, value) else ''}" if value else "-"


def sensitivity(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean test accuracy of every arm at every alpha."""
    rows = []
    for name, records in results["arms"].items():
        if not any(records[0]["alphas"]):
            continue
        row: dict[str, Any] = {"arm": name}
        for alpha in dict.fromkeys(records[0]["alphas"]):
            row[f"{alpha:g}"] = 100 * float(np.mean([at(one, alpha) for one in reported(records)]))
        rows.append(row)
    return rows


def verdict(results: Mapping[str, Any]) -> str:
    """Whether two heads beat a tuned single one, in a sentence for each form of them."""
    arms = results["arms"]
    tests = {name: tested(records) for name, records in arms.items()}
    duals = [name for name in tests if name.startswith("dual_")]
    rivals = [name for name in ("single", "kd", "dkd") if name in tests]
    lines = []
    for rival in rivals:
        for dual in duals:
            gain, p = paired(tests[dual], tests[rival])
            # The difference of two runs says nothing about the next one.
            if math.isnan(p):
                word = "no test: one seed each, or equal differences"
            elif p >= 0.05:
                word = "NOT distinguishable" if gain > 0 else "does NOT beat it"
            else:
                word = "beats it" if gain > 0 else "is WORSE"
            level = "" if math.isnan(p) else f", p={p:.2g}"
            lines.append(f"- {dual} against {rival}: {100 * gain:+.2f} points{level}: {word}")
    if len(duals) * len(rivals) > 1 and not all(line.endswith("no test") for line in lines):
        lines.append(
            f"- These are {len(duals) * len(rivals)} comparisons; at 5% each, expect "
            f"{0.05 * len(duals) * len(rivals):.1f} by chance alone."
        )
    return "\n".join(lines)


def write(config: Config, results: Mapping[str, Any], workdir: epath.Path) -> str:
    """Writes `report.md`, `results.json` and the pictures; returns the text."""
    tables = {"arms": summarise(config, results), "alphas": sensitivity(results)}
    pictures = {"alpha": by_alpha(results), "collapse": collapse(results)}
    seeds = len(reported(next(iter(results["arms"].values()))))
    text = "\n\n".join(
        [
            f"# Dual-head distillation on {config.data}",
            f"Teacher {config.teacher}: test {100 * results['teacher']['test'][0]:.2f}%. "
            f"Student {config.student}, {config.epochs} epochs, batch {config.batch_size}, "
            f"{seeds} seed(s). Each arm at the alpha of "
            f"{', '.join(f'{a:g}' for a in config.alpha)} and the multiple of the learning rate of "
            f"{', '.join(f'{a:g}' for a in config.rate)} with the best validation accuracy of a "
            "seed that is not reported; differences are points of test accuracy, paired by seed.",
            markdown_table(tables["arms"]),
            "## Does a second head pay?",
            verdict(results) or "No dual arm was run.",
            "## Test accuracy (%) by alpha",
            markdown_table(tables["alphas"]),
            "## Last values of the collapse diagnostics (first seed, chosen alpha)",
            markdown_table(_last_measures(results)),
            "\n".join(f"![{name}]({name}.png)" for name in pictures),
        ]
    )
    return write_report(workdir, text, tables=tables, pictures=pictures)


def _measures(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    record, alpha, key = records[0], best_alpha(records), f"nc/{name}"
    curves = enumerate(record["curves"], 1)
    lanes = {"validation": record["validation"], "alphas": record["alphas"]}
    return [
        (epoch, at(lanes | {key: line[key]}, alpha, key)) for epoch, line in curves if key in line
    ]


def _last_measures(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for arm, records in results["arms"].items():
        row: dict[str, Any] = {"arm": arm}
        for name in diagnostics.MEASURES:
            values = _measures(records, name)
            row[name] = values[-1][1] if values else None
        if "dual" in arm:
            row["cosine_head"] = None  # Two heads share none.
        rows.append(row)
    return rows


def by_alpha(results: Mapping[str, Any]) -> figures.Picture:
    """Test accuracy of every arm by alpha; diverged runs are below the picture."""
    series, rules, chosen = [], {}, []
    for name, records in results["arms"].items():
        alphas = list(dict.fromkeys(records[0]["alphas"]))
        chosen.append(100 * float(np.mean(tested(records))))
        if not any(alphas):
            rules[name] = chosen[-1]
        else:
            runs = [
                [(alpha, 100 * at(one, alpha)) for alpha in alphas] for one in reported(records)
            ]
            series.append(figures.Series(name=name, runs=runs))
    low = min(chosen) - 3  # points of accuracy
    shown = [y for one in series for run in one.runs for _, y in run]
    panel = figures.Panel(
        x="alpha, weight of the logit loss",
        y="test accuracy, %",
        log="x",
        series=series,
        rules=rules,
        x_ticks={f"{x:g}": x for one in series for x, _ in one.runs[0]},
        low=low if min(shown, default=low) < low else None,
        height=3.6,
    )
    return figures.Picture(panels=[panel])


def collapse(results: Mapping[str, Any]) -> figures.Picture:
    """The diagnostics of every arm by epoch, of the first seed at its chosen alpha."""
    panels = []
    for measure in diagnostics.MEASURES:
        series = []
        for name, records in results["arms"].items():
            values = _measures(records, measure)
            if values and not (measure == "cosine_head" and "dual" in name):
                series.append(figures.Series(name=name, runs=[values]))
        log = "y" if measure in ("within", "ratio_trunk") else ""
        panels.append(figures.Panel(x="epoch", y=measure, log=log, series=series, height=2.2))
    return figures.Picture(panels=panels, columns=2)
