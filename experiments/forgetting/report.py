"""Tables, verdicts and the plot of forgetting."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from scipy import stats

from experiments.forgetting.config import Config
from experiments.shared import figures
from experiments.shared.report import markdown_table, mean_and_spread, text_cell, write_report
from logitjax import unlearning

# Utility levels, in percent kept, at which the undominated methods are named.
_LEVELS = (98.0, 95.0, 90.0, 75.0, 50.0)
_NOTES = (
    "Forget probability: the median over rows to forget; the goal is that of answers that were "
    "never taught. Kept: on rows used neither for training nor for choosing, with a 95 % interval "
    "of the mean over seeds, from resampled rows. A method without a feasible candidate is shown "
    "where it reaches the goal and keeps most; the command would write nothing. Least kept: the "
    "smallest of the shares, with the inverse of perplexity."
)
_ATTACKS = (
    "Median probabilities of the answers to forget, shares of them, or AUC (0.5 is chance; a value "
    "far from it, on either side, reveals the rows). Only values above the control count. Attacks "
    "that sample use the first seed."
)


def write(config: Config, results: Mapping[str, Any], workdir: epath.Path) -> str:
    """Writes `report.md`, `metrics.jsonl` and the plot; returns the text to print."""
    target, controls = results["target"], _controls(results)
    if target is None:
        return "Nothing to report without the part target."
    tables = {
        "methods": method_rows(results),
        "attacks": attack_rows(results),
        "answers": answer_rows(results),
    }
    sections = [
        "# Forgetting",
        _setting(config),
        "## Verdicts",
        verdicts(results),
        *judged(config, results),
        "## Methods",
        markdown_table(tables["methods"]),
        _NOTES,
        "## Attacks",
        markdown_table(tables["attacks"]),
        _ATTACKS,
        "## Sample answers",
        markdown_table(tables["answers"]),
        "Greedy answers to the first question of each part, with the first seed.",
        "## Trials",
        markdown_table(trial_rows(results)),
        "## Hours",
        markdown_table(hour_rows(results)),
    ]
    pictures = {}
    if results["methods"] and controls:
        pictures["relearning"] = relearning(results)
        message = sections.index("## Sample answers")
        sections.insert(message, "![relearning](relearning.png)")
    lines = [
        {name: record[name] for name in ("method", "seed", "rate", "feasible", "shown")}
        for records in results["methods"].values()
        for record in records
    ]
    return write_report(
        workdir, "\n\n".join(sections), records=lines, tables=tables, pictures=pictures
    )


def _setting(config: Config) -> str:
    what = (
        f"{config.authors} authors of TOFU, {config.forget_authors} of them to be forgotten"
        if config.scene == "tofu"
        else "8 invented facts, to be forgotten, beside 16 known ones"
    )
    return (
        f"{config.model}, taught {what}. Every method: adapters of rank {config.lora_rank}, or all "
        f"weights where its name says so, at most {config.steps} steps of {config.batch_size} rows "
        f"to forget and as many to keep, {len(config.rates)} learning rate(s) with the first "
        f"seed, {config.seeds} seed(s). Adapters lie in all layers, an assistant's in its first "
        f"{config.layers or 'quarter'}; what was trained may be scaled to 4 times by all."
    )


def kept_shares(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """Return the shares kept of the rest, in percent; perplexity by its inverse."""
    entries = {
        "probability": np.mean(after["probabilities"]["test"])
        / np.mean(before["probabilities"]["test"])
    }
    for name, values in (
        ("ROUGE-L", [np.mean(side["rouge"]["test"]) for side in (after, before)]),
        ("fluency", [side["fluency"] for side in (after, before)]),
        ("perplexity", [side["perplexity"] for side in (before, after)]),
    ):
        if values[0] is not None and values[1]:
            entries[name] = values[0] / values[1]
    return {name: 100 * float(value) for name, value in entries.items()}


def _forget(record: Mapping[str, Any]) -> float:
    return float(np.median(record["examined"]["probabilities"]["forget"]))


def method_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every method's numbers, means over seeds."""
    before = results["target"]["examined"]
    lines = {"target": [results["target"]], "control": _controls(results)}
    rows = []
    for name, records in (lines | dict(results["methods"])).items():
        if not records:
            continue
        shares = [kept_shares(record["examined"], before) for record in records]
        row: dict[str, Any] = {"method": name}
        if "rate" in records[0]:
            row["feasible"] = f"{sum(r['feasible'] for r in records)} of {len(records)}"
            row["learning rate"] = records[0]["rate"]
            row["steps"] = ", ".join(str(r["shown"]["step"]) for r in records)
            row["strength"] = mean_and_spread([r["shown"]["strength"] for r in records])
        row["forget probability"] = mean_and_spread([_forget(r) for r in records])
        goal = float(np.median(before["probabilities"].get("holdout", [math.nan])))
        row["of the goal"] = mean_and_spread([_forget(r) / goal for r in records])
        for share in shares[0]:
            items = [s[share] for s in shares if share in s]
            row[f"{share} kept %"] = mean_and_spread(items)
        _, low, high = unlearning.share_interval(
            np.mean([r["examined"]["probabilities"]["test"] for r in records], 0),
            before["probabilities"]["test"],
        )
        row["95 %"] = f"{100 * low:.1f} to {100 * high:.1f}"
        if "topics" in records[0]:
            row["topics right %"] = mean_and_spread([100 * r["topics"] for r in records])
        row["least kept %"] = mean_and_spread([min(s.values()) for s in shares])
        if distances := _distances(records, results["controls"], inside=name == "control"):
            row["D"] = mean_and_spread(distances)
        rows.append(row)
    return rows


def _distances(
    records: Sequence[Any], controls: Sequence[Any], *, inside: bool = False
) -> list[float]:
    """Kolmogorov-Smirnov distances of truth ratios; between controls it is the floor."""
    pairs = itertools.combinations(controls, 2) if inside else itertools.product(records, controls)
    return [
        next(map(float, stats.ks_2samp(a["truth ratios"], b["truth ratios"])))
        for a, b in pairs
        if a and b and a["truth ratios"] and b["truth ratios"]
    ]


def attack_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row an attack, one column a method, means over seeds."""
    columns = {"target": [results["target"]], "control": _controls(results)}
    columns |= results["methods"]
    rows = []
    # Each way to ask has its own list of rows; older records had them among the attacks.
    for name in results["target"]["examined"].get("ways", {}):
        row = {"attack": name, "measured": "worst probability"}
        for column, records in columns.items():
            items = [r["examined"]["ways"][name] for r in records if name in r["examined"]["ways"]]
            row[column] = mean_and_spread([max(rows) for rows in items]) if items else None
        rows.append(row)
    for name, measured in results["target"]["examined"]["attacks"].items():
        for kind in measured:
            row: dict[str, Any] = {"attack": name, "measured": kind}
            for column, records in columns.items():
                values = [r["examined"]["attacks"].get(name, {}).get(kind) for r in records]
                values = [value for value in values if value is not None]
                row[column] = mean_and_spread(values) if values else None
            rows.append(row)
    taught = {"attack": "taught again, worst rate and steps", "measured": "others' probability"}
    for column, records in columns.items():
        worst = [max(p["others"] for p in r["relearning"]) for r in records if r.get("relearning")]
        taught[column] = mean_and_spread(worst) if worst else "-"
    if "difference" in results["methods"]:
        asked = results["target"]["examined"]["attacks"]["asked"]["probability"]
        rows.append(
            {"attack": "assistant left out", "measured": "probability", "difference": asked}
        )
    return [*rows, taught]


def answer_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the answers to the first question to forget and the first to keep."""
    columns = {"target": [results["target"]], "control": _controls(results)}
    sides = {"to a question to forget": "forget", "to one to keep": "test"}
    return [
        {"model": name}
        | {side: text_cell(r[0]["examined"]["answers"][part][0]) for side, part in sides.items()}
        for name, r in (columns | dict(results["methods"])).items()
        if r
    ]


def trial_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each rate tried: whether a candidate was feasible, and its distance from the goal."""
    rows = []
    for method, records in results["methods"].items():
        rates = sorted(trial["rate"] for trial in records[0]["tried"])
        for trial in records[0]["tried"]:
            nearest = min(trial["candidates"], key=lambda c: c["gap"])
            broken = sorted({b for c in trial["candidates"] for b in c["broken"]})
            taken = trial["rate"] == records[0]["rate"]
            edge = taken and len(rates) > 1 and trial["rate"] in (rates[0], rates[-1])
            rows.append(
                {
                    "method": method,
                    "learning rate": trial["rate"],
                    "feasible": trial["chosen"] is not None,
                    "gap, nats": nearest["gap"],
                    "probability kept %": 100 * nearest["probability"],
                    "limits broken": ", ".join(broken) or "none",
                    "": ("taken" + (", AT THE EDGE" if edge else "")) if taken else "",
                }
            )
    return rows


def hour_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the hours of each part."""
    parts = {"target": results["target"]}
    parts |= {f"control {n}": record for n, record in enumerate(results["controls"])}
    for method, records in results["methods"].items():
        parts |= {f"{method}, seed {record['seed']}": record for record in records}
    rows = [{"part": name, "hours": part["hours"]} for name, part in parts.items() if part]
    return [*rows, {"part": "together", "hours": sum(row["hours"] for row in rows)}]


def verdicts(results: Mapping[str, Any]) -> str:
    """The method that forgets best at each level of utility, in words."""
    before = results["target"]["examined"]
    goal = float(np.median(before["probabilities"].get("holdout", [math.nan])))
    points = {}
    for method, records in results["methods"].items():
        gap = statistics.fmean(abs(math.log(max(_forget(r), 1e-30) / goal)) for r in records)
        shares = [min(kept_shares(r["examined"], before).values()) for r in records]
        points[method] = (gap, statistics.fmean(shares))
    if not points:
        return "- no method was measured"
    lines = []
    for level in _LEVELS:
        keeping = {m: p for m, p in points.items() if p[1] >= level}
        if keeping:
            best = min(keeping, key=lambda m: keeping[m][0])
            lines.append(
                f"- keeping {level:g} % of everything: {best} comes nearest the goal, "
                f"{keeping[best][0]:.2f} nats from it ({len(keeping)} of {len(points)} methods "
                "keep that)"
            )
        else:
            lines.append(f"- no method keeps {level:g} % of everything on the table's rows")
    front = [
        m
        for m, (gap, share) in points.items()
        if not any(g <= gap and s >= share and (g, s) != (gap, share) for g, s in points.values())
    ]
    lines.append(f"- not dominated by another: {', '.join(front)}")
    never = [m for m, records in results["methods"].items() if not records[0]["feasible"]]
    lines.append(f"- feasible at none of the rates tried: {', '.join(never) or 'none'}")
    return "\n".join(lines)


def judged(config: Config, results: Mapping[str, Any]) -> list[str]:
    """Judge each method's first seed row by row, as the command does."""
    before, controls = results["target"]["examined"], _controls(results)
    if not before.get("unseen"):  # a run from before rows were judged one by one
        return []
    never = [control["examined"] for control in controls]
    lines = []
    for method, records in results["methods"].items():
        settings = config.of(method, 0.0, 0)
        verdict = unlearning.judge(
            before,
            records[0]["examined"],
            never,
            settings.limits,
            assistant=settings.method.assistant,
        )
        lines.append(f"- {method}: {verdict.words}")
    return ["\n".join(lines)] if lines else []


def relearning(results: Mapping[str, Any]) -> figures.Picture:
    """Return the curves of relearning at the worst rate, beside a model that never knew."""
    before = results["target"]["examined"]
    back, kept = [], []
    for name, records in ({"control": _controls(results)} | dict(results["methods"])).items():
        curves, shares = [], []
        for record in records:
            worst = max(record["relearning"], key=lambda p: p["others"])["rate"]
            points: dict[int, list[float]] = {0: [_forget(record)]}
            for point in record["relearning"]:
                if point["rate"] == worst:
                    points.setdefault(point["steps"], []).append(point["others"])
            curves.append([(x, statistics.fmean(points[x])) for x in sorted(points)])
            share = min(kept_shares(record["examined"], before).values())
            shares.append([(_forget(record), share)])
        back.append(figures.Series(name=name, runs=curves))
        kept.append(figures.Series(name=name, runs=shares, line=False))
    return figures.Picture(
        panels=[
            figures.Panel(
                x="steps of teaching a quarter again",
                y="probability of the other answers",
                log="y",
                series=back,
            ),
            figures.Panel(
                x="probability of answers to forget",
                y="least share kept, %",
                log="x",
                series=kept,
                names="beside",
            ),
        ]
    )


def _controls(results: Mapping[str, Any]) -> list[Any]:
    return [control for control in results["controls"] if control]
