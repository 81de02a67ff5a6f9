"""Tables, paired tests and the plot of the few-shot experiment."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from experiments import _few_shot_arms
from experiments._dual_head_report import paired
from experiments._report import markdown_table

# Top-1 on ImageNet, CLIP RN50 and, where a second encoder is used, MoCo v3 RN50, at 1 to 16 shots;
# from the READMEs and logs of the methods, CaFo's from papers that quote it.
PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "imagenet": {
        name: dict(zip((1, 2, 4, 8, 16), values))
        for name, values in {
            "amu": (62.60, 64.25, 65.92, 68.25, 70.02),
            "cafo": (63.80, 64.34, 65.64, 66.86, 68.79),
            "tip_adapter": (60.70, 60.96, 60.98, 61.45, 62.01),
            "tip_adapter_f": (61.13, 61.69, 62.52, 64.00, 65.51),
            "clip_adapter": (61.20, 61.52, 61.84, 62.68, 63.59),
        }.items()
    },
}


def _mean_std(values: Sequence[float]) -> str:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return f"{100 * mean:.1f}"
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return f"{100 * mean:.1f} +- {100 * math.sqrt(variance):.1f}"


def accuracies(name: str, arms: Mapping[str, Any], *, ablations: bool) -> list[dict[str, Any]]:
    """One row an arm, one column a number of shots."""
    known = _few_shot_arms.ABLATIONS
    shown = {arm: shots for arm, shots in arms.items() if (arm in known) == ablations}
    rows = []
    if not ablations and arms:
        by_shots = next(iter(arms.values()))
        zero = {f"{n} shots": _mean_std(r["zero_shot"]) for n, r in by_shots.items()}
        rows.append({"arm": "zero-shot"} | zero)
    for arm, by_shots in shown.items():
        columns = {f"{n} shots": _mean_std(r["test"]) for n, r in by_shots.items()}
        rows.append({"arm": arm} | columns)
        if ablations:
            alone = {f"{n} shots": _mean_std(r["auxiliary"]) for n, r in by_shots.items()}
            rows.append({"arm": f"{arm}, auxiliary alone"} | alone)
        published = PUBLISHED.get(name, {}).get(arm)
        if published:
            there = {f"{n} shots": f"{published[n]:.2f}" for n in by_shots if n in published}
            rows.append({"arm": f"{arm}, published"} | there)
    return rows


def differences(arms: Mapping[str, Any], reference: str) -> list[dict[str, Any]]:
    """Points of test accuracy that the reference arm is ahead, paired by sample."""
    rows = []
    for arm, by_shots in arms.items():
        if arm == reference:
            continue
        row: dict[str, Any] = {"against": arm}
        for shots, record in by_shots.items():
            gain, p = paired(arms[reference][shots]["test"], record["test"])
            tested = "" if math.isnan(p) else f" (p={p:.2g})"
            row[f"{shots} shots"] = f"{100 * gain:+.1f}{tested}"
        rows.append(row)
    zero: dict[str, Any] = {"against": "zero-shot"}
    for shots, record in arms[reference].items():
        gain, p = paired(record["test"], record["zero_shot"])
        tested = "" if math.isnan(p) else f" (p={p:.2g})"
        zero[f"{shots} shots"] = f"{100 * gain:+.1f}{tested}"
    return [zero, *rows]


def write(config: Any, results: Mapping[str, Any], workdir: epath.Path) -> str:
    """Write ``report.md`` and its plot; returns the text."""
    plot = _plot(results, workdir)
    parts = [
        "# Few-shot logit bias",
        f"Zero-shot: {config.encoder} by class names; auxiliary encoder: {config.auxiliary}. "
        f"{config.runs} samples; accuracy (%) on test pictures, mean +- standard deviation over "
        "samples, at the setting that was best on each sample's own validation pictures.",
    ]
    seconds = 0.0
    for name, arms in results.items():
        seconds += sum(record["seconds"] for arm in arms.values() for record in arm.values())
        parts += [f"## {name}", markdown_table(accuracies(name, arms, ablations=False))]
        ablations = accuracies(name, arms, ablations=True)
        if ablations:
            parts += [
                f"### AMU at beta {_few_shot_arms.FIXED_BETA:g}: what its parts do",
                markdown_table(ablations),
            ]
        reference = next((arm for arm in ("amu", "fixed") if arm in arms), None)
        if reference is not None and len(arms) > 1:
            parts += [
                f"### {reference} ahead of the others by (points, paired t-test)",
                markdown_table(differences(arms, reference)),
                "Samples share pictures, so the tests are optimistic; and there are many of them.",
            ]
    parts += [f"Training and scoring took {seconds:.0f} s.", f"![accuracy]({plot.name})"]
    text = "\n\n".join(parts)
    (workdir / "report.md").write_text(text + "\n")
    return text


def _plot(results: Mapping[str, Any], workdir: epath.Path) -> epath.Path:
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, len(results), figsize=(6.5 * len(results), 5), squeeze=False, layout="constrained"
    )
    for axes, (name, arms) in zip(grid.flat, results.items()):
        for arm, by_shots in arms.items():
            if arm in _few_shot_arms.ABLATIONS:
                continue
            shots = list(by_shots)
            means = [100 * sum(r["test"]) / len(r["test"]) for r in by_shots.values()]
            own = arm.startswith("amu")
            axes.plot(shots, means, "o-" if own else ".--", label=arm, linewidth=2 if own else 1)
        zero = next(iter(arms.values()))
        means = [100 * sum(r["zero_shot"]) / len(r["zero_shot"]) for r in zero.values()]
        axes.plot(list(zero), means, "k:", label="zero-shot")
        axes.set(title=name, xscale="log", xlabel="pictures of a class", ylabel="accuracy (%)")
        axes.set_xticks(list(zero), labels=[str(n) for n in zero])
    grid.flat[0].legend(fontsize=7)
    path = workdir / "accuracy.png"
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return path
