"""Tables, samples and plots of graph fusion."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments.graph_fusion.config import Config
from experiments.shared import figures
from experiments.shared.records import Record
from experiments.shared.report import bar, markdown_table, spread, text_cell, write_report

NAMES = {
    "sft": "SFT",
    "kl": "SFT + KL",
    "kl_only": "KL",
    "uld": "SFT + ULD",
    "gld": "SFT + GLD",
    "uld+gld": "SFT + ULD + GLD (InfiGFusion)",
    "uld+gld_other": "SFT + ULD + GLD to another row",
    "first_piece": "SFT + first piece",
    "pkl": "SFT + P-KL, corrected (X-Token)",
    "hybrid": "SFT + hybrid, corrected (GOLD)",
    "hkl": "SFT + H-KL, corrected (X-Token)",
    "alm": "SFT + ALM",
}

# InfiGFusion, Table 3: averages over 18 reasoning tasks, Phi-4 14B pivot, accuracy in percent.
PAPER = (
    {"model": "Phi-4 (pivot)", "average of 18 tasks": 77.43},
    {"model": "Phi-4 SFT", "average of 18 tasks": 77.94},
    {"model": "InfiGFusion", "average of 18 tasks": 84.16},
)


# Parts whose students lack layers and see the same rows.
_HEALED = ("healed_own", "healed_other", "healed_both")
_CHOSEN = (
    "Rate, mix and graph loss were chosen on validation data, in as many trials for every arm. "
)


def write(config: Config, results: Record, workdir: epath.Path) -> str:
    """Writes `report.md`, `metrics.jsonl` and `report.png`; returns the tables."""
    first = results["drops"][0]
    rows = _rows(results, first)
    parts = [markdown_table(rows)]
    if len(results["drops"]) > 1:
        parts.append(f"## By layers dropped\n\n{markdown_table(_by_layers(results))}")
    bars = _bars(first)
    if bars and config.seeds > 1:
        parts.append(f"## Bars\n\n{markdown_table(bars)}")
    table = "\n\n".join(parts)
    if jax.process_index() != 0:
        return table
    runs = [
        {"layers": drop["layers"]} | run
        for drop in results["drops"]
        for arm in drop["arms"].values()
        for run in arm["runs"]
    ]
    text, pictures = _text(config, results, table), {"report": picture(first, results["whole"])}
    write_report(workdir, text, records=runs, tables={"arms": rows}, pictures=pictures)
    return f"{table}\n\nreport: {workdir}/report.md\nplot:   {workdir}/report.png"


def _rows(results: Record, drop: Record, plain: Sequence[Record] = ()) -> list[Record]:
    """A row an arm, beside runs of SFT: the arm's own, or those of another part."""
    rows = []
    if results["whole"] is not None:
        rows.append({"arm": "whole"} | _scores([results["whole"]]))
    name = f"without {drop['layers']} layers" if drop["layers"] else "before"
    rows.append({"arm": name} | _scores([drop["before"]]))
    plain = drop["arms"].get("sft", {"runs": plain})["runs"]
    for arm, result in drop["arms"].items():
        runs = result["runs"]
        rows.append(
            {"arm": NAMES[arm]}
            | _scores(runs)
            | {
                "bits a byte below SFT": _below(runs, plain) if arm != "sft" else None,
                "trained tokens/s": spread(runs, "trained_tokens_per_second"),
                "rate": f"{runs[0]['learning_rate']:.3g}",
                "mix": runs[0]["mix"] if arm not in ("sft", "kl_only") else None,
                "graph loss": runs[0]["gld"] if "gld" in arm else None,
                "trials": result["trials"] or None,
                "seeds": len(runs),
            }
        )
    names = {key for row in rows for key, value in row.items() if value is not None}
    return [{key: value for key, value in row.items() if key in names} for row in rows]


def _scores(records: Sequence[Mapping[str, Any]]) -> Record:
    return {
        "perplexity": spread(records, "perplexity"),
        "bits a byte": spread(records, "bits_per_byte"),
        "topics %": spread(records, "topics", 100),
        "seen %": spread(records, "seen", 100),
        "agreement %": spread(records, "agreement", 100),
        "KL": spread(records, "teacher_kl"),
        "parameters": f"{records[0]['parameters'] / 1e6:.4g} M",
        "tokens/s": spread(records, "tokens_per_second"),
    }


def _below(runs: Sequence[Record], plain: Sequence[Record]) -> str | None:
    """Gain of runs over those of SFT that saw the same rows in the same order."""
    key = "bits_per_byte"
    pairs = [(run, other) for run in runs for other in plain if run["seed"] == other["seed"]]
    gains = [{"gain": other[key] - run[key]} for run, other in pairs if key in run and key in other]
    return spread(gains, "gain")


def _by_layers(results: Record) -> list[Record]:
    rows = []
    for drop in sorted(results["drops"], key=lambda drop: drop["layers"]):
        row: Record = {
            "dropped": ", ".join(map(str, drop["dropped"])),
            "parameters": f"{drop['before']['parameters'] / 1e6:.4g} M",
            "tokens/s": spread([drop["before"]], "tokens_per_second"),
            "perplexity before": spread([drop["before"]], "perplexity"),
        }
        for arm, result in drop["arms"].items():
            row[NAMES[arm]] = spread(result["runs"], "perplexity")
            row[f"{NAMES[arm]}, agreement %"] = spread(result["runs"], "agreement", 100)
        rows.append(row)
    return rows


def write_parts(config: Config, parts: Mapping[str, Record], workdir: epath.Path) -> str:
    """The report of all parts: one table each, with its purpose."""
    sections, tables = [], {}
    for name, results in parts.items():
        chosen = config.of_part(name)
        sources = " and ".join(f"`{source}`" for source in chosen.sources)
        drop = results["drops"][0]
        cut = f" without {drop['layers']} layers" if drop["layers"] else ", whole"
        topics = f", topics on {chosen.topic_rows} articles" if chosen.topic_rows else ""
        tables[name] = _rows(results, drop, _plain_healed(parts) if name in _HEALED else ())
        sections.append(
            f"## {name}: {sources} into `{chosen.student}`{cut}\n\n{chosen.course.steps} steps"
            f"{_frozen(chosen, drop)}{topics}.\n\n{markdown_table(tables[name])}"
        )
    text = "\n\n".join(sections)
    bars = _bars_of_parts(parts)
    if bars:
        text += f"\n\n## Bars\n\n{markdown_table(bars)}"
        tables["bars"] = bars
    if jax.process_index() == 0:
        runs = [
            {"part": name} | run
            for name, results in parts.items()
            for arm in results["drops"][0]["arms"].values()
            for run in arm["runs"]
        ]
        about = (
            f"# Learning across tokenizers\n\n{config.seeds} seeds, steps of "
            f"{config.course.batch_size} x {config.reading.seq_len} tokens of "
            f"`{config.reading.data}`. {_CHOSEN}Scores are on "
            f"{config.course.eval_rows} test rows; seen: share of the labels that a loss looks at. "
            "Spread is one standard deviation over seeds. Gains over SFT are paired by seed: the "
            "same rows in the same order. Each part has a report of its own in its folder.\n\n"
        )
        write_report(workdir, about + text, records=runs, tables=tables, pictures={})
    return text


def _frozen(config: Config, drop: Record) -> str:
    frozen = []
    if config.freeze_below and drop["layers"]:
        frozen.append("the embedding and what lies below the cut")
    if config.freeze:
        frozen.append(f"what matches `{config.freeze}`")
    return f"; {' and '.join(frozen)} stayed as before" if frozen else ""


def _plain_healed(parts: Mapping[str, Record]) -> Sequence[Record]:
    local = parts.get("healed_own")
    return local["drops"][0]["arms"].get("sft", {"runs": ()})["runs"] if local else ()


def _bars_of_parts(parts: Mapping[str, Record]) -> list[Record]:
    """Whether a source with another tokenizer helps beyond the spread, and two help more."""
    bars = []

    def runs(part: str, arm: str) -> np.ndarray:
        arms = parts[part]["drops"][0]["arms"] if part in parts else {}
        return np.array([run["bits_per_byte"] for run in arms.get(arm, {"runs": ()})["runs"]])

    def compare(who: str, worse: np.ndarray, better: np.ndarray) -> None:
        if len(worse) and len(better):
            gain, least = float(worse.mean() - better.mean()), _joint_spread(worse, better)
            bars.append(
                bar(f"{who}, bits a byte", gain, f"> {least:.2g}, the spread", gain > least)
            )

    for part in [name for name in ("pair", "reverse") if name in parts]:
        taught = {arm: runs(part, arm) for arm in parts[part]["drops"][0]["arms"]}
        plain = taught.pop("sft", np.array([]))
        best = min(taught, key=lambda arm: taught[arm].mean(), default="sft")
        compare(f"{part}: {NAMES[best]} below SFT", plain, taught.get(best, np.array([])))
    local, other, both = (runs(part, "first_piece") for part in _HEALED)
    compare("healed: a teacher of another tokenizer below SFT", runs("healed_own", "sft"), other)
    if len(local) and len(other):
        single = local if local.mean() < other.mean() else other
        compare("healed: two teachers below the better one", single, both)
    return bars


def _joint_spread(one: np.ndarray, other: np.ndarray) -> float:
    """Standard deviation of a difference over seeds; with one seed nothing exceeds it."""
    return float(np.hypot(one.std(ddof=1), other.std(ddof=1))) if len(one) > 1 else 0.0


def _bars(drop: Record) -> list[Record]:
    if not {"sft", "kl"} <= set(drop["arms"]) or "agreement" not in drop["before"]:
        return []
    by_seed = [
        100 * (taught["agreement"] - plain["agreement"])
        for taught, plain in zip(
            drop["arms"]["kl"]["runs"], drop["arms"]["sft"]["runs"], strict=True
        )
    ]
    gain = sum(by_seed) / len(by_seed)
    healed = max(run["perplexity"] for run in drop["arms"]["kl"]["runs"])
    before = drop["before"]["perplexity"]
    return [
        bar("perplexity of the pruned model", before, "< 50", before < 50),
        bar("perplexity of SFT + KL, worst seed", healed, "< 28", healed < 28),
        bar("points of agreement of SFT + KL over SFT", gain, ">= 3", gain >= 3),
    ]


def picture(drop: Mapping[str, Any], whole: Mapping[str, Any] | None = None) -> figures.Picture:
    """The share of pruning's cost that each arm wins back; otherwise its final score."""
    arms = {NAMES[arm]: result["runs"] for arm, result in drop["arms"].items()}
    if whole is not None and drop["layers"]:
        best, start = whole["perplexity"], drop["before"]["perplexity"]
        gains = []
        for row, (name, runs) in enumerate(arms.items()):
            end = float(np.mean([run["perplexity"] for run in runs]))
            back = f"{name}: {(start - end) / (start - best):.0%} recovered"
            gains.append(figures.Series(name=back, runs=[[(start, row), (end, row)]]))
        panel = figures.Panel(
            x="test perplexity (lower is better)",
            y="",
            series=gains,
            marks={"whole model": best, f"{drop['layers']} layers removed": start},
            y_ticks={" " * row: float(row) for row in range(len(arms))},
            names="beside",
        )
        return figures.Picture(panels=[panel])
    key = "agreement" if "agreement" in drop["before"] else "accuracy"
    what = "top-1 agreement, %" if key == "agreement" else "next-token accuracy, %"
    ends = [
        figures.Series(
            name=name, runs=[[(r["perplexity"], 100 * r[key])] for r in runs], line=False
        )
        for name, runs in arms.items()
    ]
    return figures.Picture(
        panels=[figures.Panel(x="test perplexity", y=what, series=ends, names="beside")]
    )


def _text(config: Config, results: Record, table: str) -> str:
    drop = results["drops"][0]
    cut = ", ".join(map(str, drop["dropped"]))
    samples = [{"arm": "before", "continuation": text_cell(drop["before"]["sample"])}]
    if results["whole"] is not None:
        samples.insert(0, {"arm": "whole", "continuation": text_cell(results["whole"]["sample"])})
    for arm, result in drop["arms"].items():
        samples.append({"arm": NAMES[arm], "continuation": text_cell(result["runs"][0]["sample"])})
    tried = [
        {"arm": NAMES[arm], "settings": name, "validation loss": loss}
        for arm, result in drop["arms"].items()
        for name, loss in (result["tried"] if result["trials"] > 1 else ())
    ]
    edges = [NAMES[arm] for arm, result in drop["arms"].items() if result["at_edge"]]
    at_edge = f" At an edge of the values tried: {', '.join(edges)}." if edges else ""
    return f"""# Prune and heal

Student `{config.student}`{
        f" without layers {cut}, the run that turns the stream least" if cut else ""
    }; sources
{", ".join(f"`{source}`" for source in config.sources)}; data `{
        config.reading.data
    }`. Every arm trained
{config.course.steps} steps of {config.course.batch_size} x {config.reading.seq_len} tokens{
        _frozen(config, drop)
    }.
{_CHOSEN if config.chooses else ""}Scores are on {config.course.eval_rows} test rows.{
        at_edge
    } Agreement: share of positions where the likeliest token is
the first source's; KL from its distribution, with all but its top {config.reading.top_k} tokens as
one; tokens/s: tokens read a second. Spread is one standard deviation over seeds.

{table}

![share of pruning's perplexity cost that training wins back](report.png)

## In the paper

InfiGFusion (arXiv 2505.13893) fuses 14B-24B models on 520M tokens and reports benchmark accuracy,
not perplexity, so its numbers are no bar for this run:

{markdown_table(PAPER)}

## Samples

Likeliest continuations of "{text_cell(drop["before"]["prompt"])}":

{markdown_table(samples)}
{
        f'''
## Trials

{markdown_table(tried)}
'''
        if tried
        else ""
    }"""
