"""Tables, paired tests and the plot of the few-shot experiment."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from experiments.few_shot.arms import FIXED_BETA
from experiments.few_shot.config import METHODS, Config
from experiments.few_shot.sources import CLIP_SOURCES
from experiments.shared import figures
from experiments.shared.report import markdown_table, paired, write_report
from logitjax import few_shot

Records = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by arm, by shots
Row = dict[str, Any]


def _by_shots(**rows: Sequence[float]) -> dict[str, dict[int, float]]:
    return {name: dict(zip((1, 2, 4, 8, 16), values)) for name, values in rows.items()}


# Top-1 with CLIP RN50 and, if a second encoder is used, MoCo v3 RN50, from the READMEs and logs of
# the methods; CaFo's as others quote it, and means read from AMU's figure (+-.15).
_MEAN = "mean of the data sets"
PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "imagenet": _by_shots(
        amu=(62.60, 64.25, 65.92, 68.25, 70.02),
        cafo=(63.80, 64.34, 65.64, 66.86, 68.79),
        tip_adapter=(60.70, 60.96, 60.98, 61.45, 62.01),
        tip_adapter_f=(61.13, 61.69, 62.52, 64.00, 65.51),
        clip_adapter=(61.20, 61.52, 61.84, 62.68, 63.59),
    ),
    "imagenet on imagenet_v2": {"amu": {16: 58.64}},
    "imagenet on imagenet_sketch": {"amu": {16: 40.04}},
    _MEAN: _by_shots(
        amu=(66.9, 69.0, 73.2, 76.4, 79.4),
        cafo=(67.9, 69.5, 73.0, 75.9, 78.8),
        tip_adapter_f=(65.1, 67.1, 70.2, 72.8, 75.9),
    ),
}


def _mean_std(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _row(arm: str, values: Mapping[int, Any]) -> Row:
    return {"arm": arm} | {f"{n} shots": text for n, text in values.items()}


def _known(arm: str, table: Mapping[str, Mapping[int, float]], shots: Any, label: str) -> list[Row]:
    entries = {n: f"{table[arm][n]:.1f}" for n in shots if n in table.get(arm, {})}
    return [_row(f"{arm}, {label}", entries)] if entries else []


def _scores(by_shots: Mapping[int, Mapping[str, Any]], part: str = "test") -> dict[int, str]:
    return {n: _mean_std(record[part]) for n, record in by_shots.items()}


def accuracies(name: str, arms: Records) -> list[Row]:
    """One row a tuned method, one column a number of shots, with published figures below it.

    `settings` is the number it chose from, `updates` its gradient steps at the most shots.
    """
    rows = [_row("zero-shot", _scores(next(iter(arms.values())), "zero_shot"))]
    for arm in (arm for arm in arms if arm in METHODS):
        most = arms[arm][max(arms[arm])]
        settings = {len(column) for column in most["grid"].values()}
        cost = {"settings": max(settings, default=1), "updates": most["updates"]}
        rows.append(_row(arm, _scores(arms[arm])) | cost)
        rows += _known(arm, PUBLISHED.get(name, {}), arms[arm], "published")
    return rows


def ablations(arms: Records) -> list[Row]:
    """AMU at one beta: fused accuracies and those of its bias alone."""
    rows = []
    for arm in (arm for arm in arms if arm not in METHODS):
        rows.append(_row(arm, _scores(arms[arm])))
        rows.append(_row(f"{arm}, bias alone", _scores(arms[arm], "auxiliary")))
    return rows


def shifted(name: str, arms: Records) -> dict[str, list[Row]]:
    """Accuracies on the shifted pictures, by source."""
    tables: dict[str, list[Row]] = {}
    for arm, by_shots in arms.items():
        for location in next(iter(by_shots.values()))["shifted"]:
            scored = {n: record["shifted"][location] for n, record in by_shots.items()}
            if location not in tables:
                tables[location] = [_row("zero-shot", _scores(scored, "zero_shot"))]
            tables[location].append(_row(arm, _scores(scored)))
            existing = PUBLISHED.get(f"{name} on {location}", {})
            tables[location] += _known(arm, existing, by_shots, "published")
    return tables


def means(results: Mapping[str, Records]) -> list[Row]:
    """Accuracies of every arm, averaged over the data sets."""
    first = next(iter(results.values()))
    rows = []
    for arm in first:
        columns = {}
        for shots in first[arm]:
            runs = [arms[arm][shots]["test"] for arms in results.values()]
            columns[shots] = _mean_std(list(map(statistics.fmean, zip(*runs))))
        rows.append(_row(arm, columns))
        if set(results) == set(CLIP_SOURCES):
            rows += _known(arm, PUBLISHED[_MEAN], columns, "published")
    return rows


def differences(arms: Records, reference: str) -> list[Row]:
    """Points of test accuracy by which the reference arm is ahead, paired by sample."""

    def compared(against: str, pairs: Mapping[int, tuple[Any, Any]]) -> Row:
        row: Row = {"against": against}
        for shots, pair in pairs.items():
            gain, p = paired(*pair)
            tested = "" if math.isnan(p) else f" (p={p:.2g})"
            row[f"{shots} shots"] = f"{100 * gain:+.1f}{tested}"
        return row

    local = arms[reference]
    rows = [compared("zero-shot", {n: (r["test"], r["zero_shot"]) for n, r in local.items()})]
    for arm, by_shots in arms.items():
        if arm != reference:
            pairs = {n: (local[n]["test"], record["test"]) for n, record in by_shots.items()}
            rows.append(compared(arm, pairs))
    return rows


def write(config: Config, results: Mapping[str, Records], workdir: epath.Path) -> str:
    """Writes `report.md`, `results.json` and the picture; returns the text."""
    parts = [
        "# Few-shot logit bias",
        f"Zero-shot: {config.encoder} by class names; auxiliary encoder: {config.auxiliary}. "
        f"{config.runs} samples; accuracy (%) on test pictures, mean +- standard deviation over "
        "samples, at the setting that was best on each sample's own validation pictures. Every "
        f"tuned arm tried {few_shot.Candidate.all(config.grid)['amu'].settings} settings.",
    ]
    for name, arms in results.items():
        parts += _of_data_set(name, arms)
    tables = {name: accuracies(name, arms) for name, arms in results.items()}
    if len(results) > 2:
        tables[_MEAN] = means(results)
        parts += [f"## {_MEAN.capitalize()}", markdown_table(tables[_MEAN])]
    records = [r for arms in results.values() for by in arms.values() for r in by.values()]
    seconds = math.fsum(record["seconds"] for record in records)
    parts += [f"Training and scoring took {seconds:.0f} s.", "![accuracy](accuracy.png)"]
    pictures = {"accuracy": picture(results)}
    return write_report(workdir, "\n\n".join(parts), tables=tables, pictures=pictures)


def _of_data_set(name: str, arms: Records) -> list[str]:
    parts = [f"## {name}", markdown_table(accuracies(name, arms))]
    fixed = ablations(arms)
    if fixed:
        parts += [
            f"### AMU at beta {FIXED_BETA:g}, untuned: what its parts do",
            markdown_table(fixed),
        ]
    for location, rows in shifted(name, arms).items():
        parts += [f"### Scored on {location}", markdown_table(rows)]
    leader = next((arm for arm in ("amu", "fixed") if arm in arms), None)
    if leader is not None and len(arms) > 1:
        parts += [
            f"### {leader} ahead of the others by (points, paired t-test)",
            markdown_table(differences(arms, leader)),
            "Samples share pictures, so the tests are optimistic; and there are many of them.",
        ]
    return parts


def picture(results: Mapping[str, Records]) -> figures.Picture:
    """Every tuned method's accuracies at the fewest, some and the most shots, the best on top."""
    panels = []
    for name, arms in results.items():
        shown = [arm for arm in arms if arm in METHODS or arm == "fixed"] or list(arms)
        shots = list(arms[shown[0]])
        most = arms[shown[0]][shots[-1]]
        shown.sort(key=lambda arm: math.fsum(arms[arm][shots[-1]]["test"]))
        series = []
        for n in dict.fromkeys((shots[0], shots[len(shots) // 2], shots[-1])):
            scores = [arms[arm][n]["test"] for arm in shown]
            runs = [[(100 * a, float(row)) for row, a in enumerate(run)] for run in zip(*scores)]
            series.append(figures.Series(name=f"{n} a class", runs=runs, line=False))
        panels.append(
            figures.Panel(
                x="accuracy on test pictures, %",
                y="method",
                title=name,
                series=series,
                marks={"zero-shot": 100 * math.fsum(most["zero_shot"]) / len(most["zero_shot"])},
                y_ticks={arm: float(row) for row, arm in enumerate(shown)},
                names="beside",
                height=1.0 + 0.17 * len(shown),
            )
        )
    return figures.Picture(panels=panels)
