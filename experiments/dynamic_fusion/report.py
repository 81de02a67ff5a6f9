"""The tables, verdicts and plots of dynamic fusion."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from experiments.dynamic_fusion.arms import SEVERAL, SINGLE, static_name
from experiments.dynamic_fusion.config import Config
from experiments.shared import figures
from experiments.shared.report import markdown_table, mean_and_spread, spread, write_report

_TITLES = {
    "domain": "text of the first domain",
    "task": "questions of the second domain",
    "general": "general text",
}


def gap_closed(value: float, base: float, ceiling: float) -> float | None:
    """(x - base) / (ceiling - base) in percent; None where there is no gap."""
    return 100 * (value - base) / (ceiling - base) if abs(ceiling - base) > 1e-9 else None


def write(config: Config, results: Mapping[str, Any], workdir: epath.Path) -> str:
    """Writes `report.md`, `metrics.jsonl` and plots; returns the text to print."""
    seeds = results["seeds"]
    tables = []
    for which, domain in (("first", "domain"), ("second", "task")):
        for name in seeds[0]["single"][domain]:
            title = f"One expert, of the {which} domain, on {_TITLES[name]}"
            tables.append((title, single_table(seeds, domain, name)))
    for name in seeds[0]["several"]:
        title = f"Both experts, on {_TITLES[name]}"
        tables.append((title, several_table(seeds, name)))
    text = f"# Dynamic fusion\n\n{_setting(config, seeds)}\n"
    for title, rows in tables:
        text += f"\n## {title}\n\n{markdown_table(rows)}\n"
    if "graded" in seeds[0]:
        text += f"\n## Answers graded by lm-evaluation-harness\n\n{markdown_table(graded(seeds))}\n"
    if results["speeds"]:
        text += f"\n## Greedy decoding, one row\n\n{markdown_table(results['speeds'])}\n"
    text += f"\n![alpha over tokens](alpha.png)\n\n{_NOTES}\n"
    pictures = {"alpha": traces(results["traces"])}
    return write_report(workdir, text, records=seeds, tables=dict(tables), pictures=pictures)


_NOTES = (
    "Gap closed is (x - large) / (ceiling - large): 0 for the untouched large model, 100 for the "
    "large model tuned on the same data. The paper's ratio is x / ceiling for accuracies and "
    "ceiling / x for perplexities; it is high for the untouched model too. `static` is "
    "proxy-tuning with the alpha that was best on validation data of the expert's own domain."
)


def _setting(config: Config, seeds: Sequence[Any]) -> str:
    base = config.base or f"layers {', '.join(map(str, config.small_layers))} of it, healed"
    general = seeds[0]["single"]["domain"]["general"]
    perplexities = (f"{math.exp(general[name]['nll']):.4g}" for name in ("large", "base"))
    return (
        f"Large model {config.large}; small base: {base}. Their perplexity of general text: "
        f"{' and '.join(perplexities)}. Domains: {config.domain} and "
        f"{config.task}; general text: {config.general}. {len(seeds)} seed(s) of experts and "
        f"ceilings."
    )


def single_table(seeds: Sequence[Any], domain: str, name: str) -> list[dict[str, Any]]:
    """Every arm with one expert, scored on one data set."""
    rows = [("large", "large"), ("small base", "base"), ("expert", "expert 0")]
    rows += [(arm, arm) for arm in SINGLE]
    static = [static_name(seed["chosen"][domain]) for seed in seeds]
    table = [
        _row(label, [seed["single"][domain][name][arm] for seed in seeds], seeds, domain, name)
        for label, arm in rows
    ]
    chosen = [seed["single"][domain][name][arm] for seed, arm in zip(seeds, static, strict=True)]
    table.insert(4, _row("static", chosen, seeds, domain, name))
    ceilings = [seed["ceiling"][domain][name] for seed in seeds]
    return [*table, _row("large, tuned (ceiling)", ceilings, seeds, domain, name)]


def graded(seeds: Sequence[Any]) -> list[dict[str, Any]]:
    """The harness's metrics of every arm, and their place between large model and ceiling."""
    rows = []
    for arm, metrics in seeds[0]["graded"].items():
        for metric in metrics:
            scores, starts, ends = (
                [100 * seed["graded"][name][metric] for seed in seeds]
                for name in (arm, "large", "ceiling")
            )
            gaps = [gap_closed(*one) for one in zip(scores, starts, ends, strict=True)]
            items = [gap for gap in gaps if gap is not None]
            ratios = [100 * score / end for score, end in zip(scores, ends, strict=True) if end]
            row = {"arm": arm, "metric": metric, "%": mean_and_spread(scores)}
            row["gap closed %"] = mean_and_spread(items) if items else None
            row["paper's ratio %"] = mean_and_spread(ratios) if ratios else None
            rows.append(row)
    return rows


def several_table(seeds: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """Every arm with both experts; the gap is that of the data set's own ceiling."""
    domain = name if name in ("domain", "task") else None
    rows = [("large", "large"), *[(arm, arm) for arm in SEVERAL]]
    table = [
        _row(label, [seed["several"][name][arm] for seed in seeds], seeds, domain, name)
        for label, arm in rows
    ]
    chosen = [seed["several"][name][static_name(seed["chosen"]["several"])] for seed in seeds]
    table.insert(2, _row("static", chosen, seeds, domain, name))
    return table


def _row(
    label: str,
    means: Sequence[Mapping[str, float]],
    seeds: Sequence[Any],
    domain: str | None,
    name: str,
) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": label, "NLL": spread(means, "nll")}
    row["accuracy %"] = spread(means, "accuracy", 100)
    if domain == name:
        for measure, title in (("nll", "NLL"), ("accuracy", "accuracy")):
            gaps = [
                gap_closed(
                    result[measure],
                    seed["single"][name][name]["large"][measure],
                    seed["ceiling"][name][name][measure],
                )
                for result, seed in zip(means, seeds, strict=True)
            ]
            items = [gap for gap in gaps if gap is not None]
            row[f"gap closed, {title} %"] = mean_and_spread(items) if items else None
        ratios = [_ratio(result, seed, name) for result, seed in zip(means, seeds, strict=True)]
        row["paper's ratio %"] = mean_and_spread(ratios)
    for key, title, factor in (("alpha", "mean alpha", 1), ("at_bound", "at bound %", 100)):
        row[title] = spread(means, key, factor)
    return row


def _ratio(scores: Mapping[str, float], seed: Any, name: str) -> float:
    ceiling = seed["ceiling"][name][name]
    if name == "task":
        return 100 * scores["accuracy"] / ceiling["accuracy"] if ceiling["accuracy"] else 0.0
    return 100 * math.exp(ceiling["nll"] - scores["nll"])


def traces(record: Mapping[str, Any]) -> figures.Picture:
    """Alpha over tokens: one expert on its domain, and both over three kinds of text."""

    def series(name: str, alphas: Sequence[float]) -> figures.Series:
        return figures.Series(name=name, runs=[list(enumerate(alphas))])

    named: dict[str, Any] = {"x": "token", "y": "alpha", "height": 1.9}
    panels = [
        figures.Panel(
            title="one expert, text of its domain",
            series=[series(name, alphas[0]) for name, alphas in record["single"].items()],
            **named,
        )
    ]
    for name, alphas in record["several"].items():
        if "jeffreys, joint" in name:
            continue
        experts = ("expert of the first domain", "of the second")
        panels.append(
            figures.Panel(
                title=name,
                series=[series(*one) for one in zip(experts, alphas, strict=True)],
                marks={"questions": record["part"], "general text": 2 * record["part"]},
                **named,
            )
        )
    return figures.Picture(panels=panels)
