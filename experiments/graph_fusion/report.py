"""report.md and plots of graph fusion."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from experiments.graph_fusion.config import Config
from experiments.graph_fusion.train import Outcome
from experiments.shared.report import format_value, markdown_table, mean_and_spread

NAMES = {
    "sft": "SFT",
    "kl": "SFT + KL",
    "uld": "SFT + ULD",
    "gld": "SFT + GLD",
    "uld+gld": "SFT + ULD + GLD (InfiGFusion)",
    "dual": "SFT + second head",
}

# InfiGFusion, Table 3: averages over 18 reasoning tasks, Phi-4 14B pivot, accuracy in percent.
PAPER = (
    {"model": "Phi-4 (pivot)", "average of 18 tasks": 77.43},
    {"model": "Phi-4 SFT", "average of 18 tasks": 77.94},
    {"model": "InfiGFusion", "average of 18 tasks": 84.16},
)


def write(config: Config, results: Mapping[str, Any], workdir: epath.Path) -> str:
    """Write `report.md`, `results.json` and `report.png`; returns the table."""
    outcomes, before = results["outcomes"], results["before"]
    rows = [_before_row(before)]
    rows += [_row(loss, _of(outcomes, loss)) for loss in config.loss]
    table = markdown_table(rows)
    if jax.process_index() != 0:
        return table
    records = [dataclasses.asdict(outcome) for outcome in outcomes]
    (workdir / "results.json").write_text(
        json.dumps({"before": before, "outcomes": records}, indent=1) + "\n"
    )
    with (workdir / "metrics.jsonl").open("w") as file:
        for record in records:
            kept = {k: v for k, v in record.items() if k not in ("curve", "sample")}
            file.write(json.dumps(kept) + "\n")
    plot(config, outcomes, workdir / "report.png")
    (workdir / "report.md").write_text(_text(config, outcomes, before, table))
    return f"{table}\n\nreport: {workdir}/report.md\nplot:   {workdir}/report.png"


def _of(outcomes: Sequence[Outcome], loss: str) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.loss == loss]


def _before_row(before: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "arm": "pivot, untrained",
        "perplexity": format_value(before["perplexity"]),
        "agreement %": _percent([before.get("agreement")]),
        "accuracy %": _percent([before["accuracy"]]),
    }


def _row(loss: str, runs: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "arm": NAMES[loss],
        "perplexity": mean_and_spread([run.perplexity for run in runs]),
        "agreement %": _percent([run.agreement for run in runs]),
        "accuracy %": _percent([run.accuracy for run in runs]),
        "s/step": mean_and_spread([run.seconds_per_step for run in runs]),
        "learning rate": runs[0].learning_rate,
        "graph loss": runs[0].gld,
        "seeds": len(runs),
    }


def _percent(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    return mean_and_spread(known) if known else "-"


def plot(config: Config, outcomes: Sequence[Outcome], path: epath.Path) -> None:
    """Validation perplexity over steps, and where each arm ended."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, ends) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, loss in enumerate(config.loss):
        for j, run in enumerate(_of(outcomes, loss)):
            steps, values = zip(*run.curve, strict=True)
            label = NAMES[loss] if j == 0 else None
            curves.plot(steps, values, "o-", color=f"C{i}", markersize=3, alpha=0.8, label=label)
            score = run.accuracy if run.agreement is None else run.agreement
            ends.plot(run.perplexity, 100 * score, "o", color=f"C{i}", markersize=8, label=label)
    curves.set(xlabel="step", ylabel="validation perplexity", yscale="log")
    curves.legend(fontsize=8)
    agreed = all(run.agreement is not None for run in outcomes)
    what = "top-1 agreement with the first source" if agreed else "next-token accuracy"
    ends.set(xlabel="test perplexity (lower is better)", ylabel=f"{what} (%)")
    for axes in (curves, ends):
        axes.grid(alpha=0.3)
    with path.open("wb") as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def _text(
    config: Config, outcomes: Sequence[Outcome], before: Mapping[str, Any], table: str
) -> str:
    samples = [{"arm": "pivot, untrained", "continuation": _cell(before["sample"])}]
    for loss in config.loss:
        run = _of(outcomes, loss)[0]
        samples.append({"arm": NAMES[loss], "continuation": _cell(run.sample)})
    return f"""# Graph fusion

Pivot `{config.pivot}`{_layers(config)}, sources {", ".join(f"`{s}`" for s in config.source)}, data
`{config.data}`. Every arm trained {config.steps} steps of {config.batch_size} x {config.seq_len}
tokens; its learning rate was chosen on validation data from {list(config.learning_rate)}; scores
are on test rows. `mix` = {config.mix}, top {config.top_k} logits. Spread is one
standard deviation over seeds.

{table}

![validation curves and test scores](report.png)

## In the paper

InfiGFusion (arXiv 2505.13893) fuses 14B-24B models on 520M tokens and reports benchmark accuracy,
not perplexity, so its numbers are no bar for this run:

{markdown_table(PAPER)}

## Samples

Greedy continuations of "{config.prompt}":

{markdown_table(samples)}
"""


def _layers(config: Config) -> str:
    layers = config.pivot_layers
    return f" (layers {', '.join(map(str, layers))})" if layers else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
