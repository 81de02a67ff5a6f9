"""The tables, verdicts and plot of unlearning."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from experiments.shared.report import (
    markdown_table,
    mean_and_spread,
    spread,
    write_report,
)
from experiments.unlearning.config import Config
from logitjax.commands import figures

_NOTES = (
    "D is the Kolmogorov-Smirnov distance of truth ratios on the forget set from those of the "
    "retrained model, 0 where the two cannot be told apart, and p the test's p-value (TOFU's "
    "forget quality), which falls with the number of items at the same D. The epoch of each arm is "
    "the one with the largest (1 - D) x (share of the target's utility) on validation. Seconds are "
    "medians of whole steps without compilation; MiB is what the compiler plans for one step, "
    "weights, optimizer and reference model included."
)
_SHARE = "% of target's"
#: Means of multiples of one over the number of items, added up in another order.
_TIE = 1e-9
_UNCHANGED = (
    "The logit difference leaves the target's weights as they are: whoever has them, and leaves "
    "the assistant out, has the target of the first row."
)


def write(config: Config, results: Mapping[str, Any], workdir: epath.Path) -> str:
    """Writes `report.md`, `metrics.jsonl` and the plot; returns what to print."""
    text = f"# Unlearning\n\n{_setting(config)}\n\n## Verdicts\n\n{verdicts(results)}\n\n"
    text += f"{_UNCHANGED}\n\n## Arms\n\n{markdown_table(arm_rows(results))}\n\n{_NOTES}\n\n"
    text += f"## Training\n\n{markdown_table(training_rows(results))}\n\n"
    text += (
        f"## What comes back\n\n{markdown_table(probe_rows(results))}\n\n{_probe_notes(config)}\n"
    )
    if "rates" in results:
        text += (
            "\n## Learning rates\n\nThe best score on validation by what the learning rate was "
            f"multiplied by, seed 0.\n\n{markdown_table(rate_rows(results))}\n"
        )
    if "alphas" in results:
        text += (
            "\n## Alpha and filter, one assistant\n\n" + markdown_table(results["alphas"]) + "\n"
        )
    if results.get("betas"):
        text += (
            "\n## Beta, an assistant each\n\nThe best score on validation, seed 0, and the same "
            f"assistant on the test.\n\n{markdown_table(results['betas'])}\n"
        )
    text += "\n![forgetting and utility](scatter.png)\n"
    lines = [
        {"arm": arm, "seed": seed, **{k: v for k, v in record.items() if k != "history"}}
        for arm, records in results["arms"].items()
        for seed, record in enumerate(records)
    ]
    tables = {"arms": arm_rows(results), "what comes back": probe_rows(results)}
    pictures = {"scatter": scatter(results)}
    return write_report(workdir, text, records=lines, tables=tables, pictures=pictures)


def _setting(config: Config) -> str:
    what = f"layers {', '.join(map(str, config.layers))} of " if config.layers else ""
    return (
        f"Target: {what}{config.model}, finetuned on {config.authors} authors of TOFU "
        f"({config.tofu_dir.rstrip('/').rpartition('/')[2]}), {config.forget_authors} of them to "
        f"be forgotten; assistants of {config.assistant_layers} layers; {config.seeds} seed(s) of "
        "every arm, one target and one retrained model. Utility: "
        + (
            "TOFU's nine numbers."
            if config.utility == "tofu"
            else "probability, ROUGE-L and truth ratio of the data to keep (a model cut out of "
            "another knows nothing of the world, which TOFU's nine numbers ask for too)."
        )
    )


def _values(records: Sequence[Any], name: str) -> list[float]:
    return [r["test"][name] for r in records if name in r["test"]]


def _cell(records: Sequence[Any], name: str) -> str | None:
    return spread([record["test"] for record in records], name)


def _lines(results: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: [results[name]] for name in ("target", "retrained")}, **results["arms"]}


def arm_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every arm's numbers on the test questions."""
    whole = results["target"]["test"]["utility"]
    rows = []
    for arm, records in _lines(results).items():
        share = [100 * u / whole for u in _values(records, "utility")] if whole else []
        rows.append(
            {
                "arm": arm,
                "epoch": ", ".join(str(r["epoch"]) for r in records if "epoch" in r) or None,
                "alpha": ", ".join(f"{r['alpha']:g}" for r in records if "alpha" in r) or None,
                "filter": ", ".join(r["filter"] for r in records if "filter" in r) or None,
                "D": _cell(records, "forget_quality.statistic"),
                "p": _cell(records, "forget_quality.p_value"),
                "forget prob": _cell(records, "forget.probability"),
                "forget ROUGE-L": _cell(records, "forget.rouge_l"),
                "forget truth ratio": _cell(records, "forget.truth_ratio"),
                "retain prob": _cell(records, "retain.probability"),
                "retain ROUGE-L": _cell(records, "retain.rouge_l"),
                "utility": _cell(records, "utility"),
                _SHARE: mean_and_spread(share) if share else None,
            }
        )
    return rows


def training_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What training took."""
    rows = []
    for arm, records in results["arms"].items():
        first = records[0]
        rows.append(
            {
                "arm": arm,
                "s an epoch": spread(records, "seconds_per_epoch"),
                "s to the best": spread(records, "seconds_to_best"),
                "MiB": first["peak_bytes"] / 2**20,
                "trained, M": first["trained"] / 1e6,
            }
        )
    return rows


def rate_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores on validation of the learning rates that were tried, and the one chosen."""
    return [
        {
            "arm": arm,
            **{f"x{float(rate):g}": score for rate, score in scores.items()},
            "chosen": f"x{results['arms'][arm][0]['rate']:g}",
        }
        for arm, scores in results["rates"].items()
    ]


def probe_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Probabilities of forgotten answers under the probes, seed 0."""
    rows = []
    for arm, (record, *_) in _lines(results).items():
        asked = {"as trained": record["test"].get("forget.probability")}
        rows.append({"arm": arm, **asked, **record["probe"]})
    if "bypassed" in results:
        target = results["target"]
        asked = {"as trained": target["test"].get("forget.probability")}
        rows.append({"arm": "difference, bypassed", **asked, **target["probe"]})
    return rows


def _probe_notes(config: Config) -> str:
    return (
        "The numbers are probabilities of the answer, for its length. `taught` and `others` are "
        f"two parts of the forget set. `relearned` is after {config.relearn_steps} steps on "
        "`taught` alone; the retrained model's row shows what that does to a model that never "
        "knew. `difference, bypassed` has the target's own numbers, because its weights were never "
        "touched."
    )


def verdicts(results: Mapping[str, Any]) -> str:
    """Whether the logit difference forgets best, and what it keeps; plainly."""
    whole = results["target"]["test"]["utility"]
    distance = {
        arm: statistics.fmean(_values(records, "forget_quality.statistic"))
        for arm, records in results["arms"].items()
        if _values(records, "forget_quality.statistic")
    }
    if not distance:
        return "- no arm was measured"
    kept = {
        arm: statistics.fmean(_values(results["arms"][arm], "utility")) / whole if whole else 0.0
        for arm in distance
    }
    first = [arm for arm in distance if distance[arm] < min(distance.values()) + _TIE]
    best = max(first, key=lambda arm: kept[arm])
    also = "".join(f", {arm} too" for arm in first if arm != best)
    lines = [
        f"- smallest D of all arms: {best} ({distance[best]:.3f}{also}), keeping "
        f"{100 * kept[best]:.1f} % of the target's utility (the target's own D is "
        f"{results['target']['test']['forget_quality.statistic']:.3f})"
    ]
    keeping = [arm for arm in distance if kept[arm] >= 0.98]
    if keeping:
        least = min(keeping, key=lambda arm: distance[arm])
        lines.append(
            f"- smallest D of those that keep at least 98 %: {least} ({distance[least]:.3f})"
        )
    swept = [row for row in results.get("alphas", ()) if row[_SHARE] >= 98]
    if swept:
        row = min(swept, key=lambda row: (row["D"], row["forget probability"]))
        lines.append(
            f"- of the sweep of alpha (seed 0, on the test), alpha {row['alpha']:g} and filter "
            f"{row['filter']} keep {row[_SHARE]:.1f} % at D {row['D']:.3f}"
        )
    for arm in distance:
        if not arm.startswith("difference"):
            continue
        others = {a: d for a, d in distance.items() if not a.startswith("difference")}
        rank = 1 + sum(d < distance[arm] - _TIE for d in distance.values())
        fine = "at least" if kept[arm] >= 0.98 else "LESS than"
        beaten = "" if not others else _against(distance[arm], min(others.values()))
        lines.append(
            f"- {arm}: keeps {100 * kept[arm]:.1f} % of the utility ({fine} 98 %), D "
            f"{distance[arm]:.3f}, rank {rank} of {len(distance)}{beaten}"
        )
    return "\n".join(lines)


def _against(d: float, best: float) -> str:
    if abs(d - best) < _TIE:
        return f", as small as the best of the others ({best:.3f})"
    return f", {'smaller' if d < best else 'NOT smaller'} than the best of the others ({best:.3f})"


def scatter(results: Mapping[str, Any]) -> figures.Picture:
    """Forgetting against utility: right and up is better."""
    measures: Sequence[tuple[str, str, Callable[[float], float]]] = (
        ("forget_quality.statistic", "1 - D, of truth ratios on the forget set", lambda d: 1 - d),
        ("forget_quality.log10_p_value", "log10 p, TOFU's forget quality", lambda p: p),
    )
    panels = []
    for name, label, value in measures:
        series = []
        for arm, records in _lines(results).items():
            # The retrained model is the reference: nothing is between it and itself.
            runs = [
                [(value(r["test"].get(name, 0.0)), r["test"]["utility"])]
                for r in records
                if name in r["test"] or arm == "retrained"
            ]
            series.append(figures.Series(name=arm, runs=runs, line=False))
        panels.append(
            figures.Panel(x=label, y="utility", series=series, names="beside", height=3.4)
        )
    return figures.Picture(panels=panels)
