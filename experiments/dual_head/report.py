"""Tables, paired tests and plots of the dual-head experiment."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments.dual_head import diagnostics
from experiments.dual_head.config import Config
from experiments.shared.report import markdown_table, mean_and_spread, paired

# Top-1 accuracy on CIFAR-100 that the READMEs of mdistiller and LSKD print (teacher, student).
PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    ("resnet56", "resnet20"): dict(T=72.34, ce=69.06, kd=70.66, dkd=71.97, kd_standardized=71.43),
    ("resnet110", "resnet32"): dict(T=74.31, ce=71.14, kd=73.08, dkd=74.11, kd_standardized=74.17),
    ("resnet110", "resnet20"): dict(T=74.31, ce=69.06, kd=70.67, dkd=71.06, kd_standardized=71.48),
    ("resnet32x4", "resnet8x4"): dict(
        T=79.42, ce=72.50, kd=73.33, dkd=76.32, kd_standardized=76.62
    ),
    ("wrn_40_2", "wrn_16_2"): dict(T=75.61, ce=73.26, kd=74.92, dkd=76.24, kd_standardized=76.11),
    ("wrn_40_2", "wrn_40_1"): dict(T=75.61, ce=71.98, kd=73.54, dkd=74.81, kd_standardized=74.37),
    ("vgg13", "vgg8"): dict(T=74.64, ce=70.36, kd=72.98, dkd=74.68, kd_standardized=74.36),
    ("resnet32x4", "shufflenet_v2"): dict(
        T=79.42, ce=71.82, kd=74.45, dkd=77.07, kd_standardized=75.56
    ),
    ("vgg13", "mobilenet_v2"): dict(T=74.64, ce=64.60, kd=67.37, dkd=69.71, kd_standardized=68.61),
    ("imagenet_resnet34", "imagenet_resnet18"): dict(kd=71.03, dkd=71.70),
}


def best_alpha(records: Sequence[Mapping[str, Any]]) -> int:
    """The value of alpha (its number) whose mean validation accuracy over seeds is highest.

    Raises:
        ValueError: No alpha has an accuracy that is a number with every seed.
    """
    validation = np.array([record["validation"] for record in records], np.float64).mean(0)
    if np.isnan(validation).all():
        raise ValueError(f"validation: expected an accuracy of some alpha, got {validation}")
    return int(np.nanargmax(validation))


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def summarise(config: Config, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row an arm, at its best alpha."""
    arms = results["arms"]
    chosen = {name: best_alpha(records) for name, records in arms.items()}
    tests = {
        name: [record["test"][chosen[name]] for record in records] for name, records in arms.items()
    }
    published = PUBLISHED.get((config.teacher, config.student), {})
    rows = []
    for name, records in arms.items():
        alphas = records[0]["alphas"]
        edge = len(alphas) > 2 and chosen[name] in (0, len(alphas) - 1)
        validation = [record["validation"][chosen[name]] for record in records]
        row: dict[str, Any] = {
            "arm": name,
            "alpha": f"{alphas[chosen[name]]:g}{' (edge)' if edge else ''}"
            if len(alphas) > 1 or alphas[0]
            else "-",
            "validation %": mean_and_spread(_percent(validation)),
            "test %": mean_and_spread(_percent(tests[name])),
        }
        for other in ("ce", "kd", "single"):
            if other in tests and other != name:
                gain, p = paired(tests[name], tests[other])
                tested = "" if math.isnan(p) else f" (p={p:.2g})"
                row[f"vs {other}"] = f"{100 * gain:+.2f}{tested}"
        if published:
            row["published %"] = published.get(name)
        rows.append(row)
    return rows


def sensitivity(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean test accuracy of every arm at every alpha."""
    rows = []
    for name, records in results["arms"].items():
        alphas = records[0]["alphas"]
        if len(alphas) == 1 and not alphas[0]:
            continue
        means = np.array([record["test"] for record in records]).mean(0)
        rows.append({"arm": name} | {f"{a:g}": 100 * float(m) for a, m in zip(alphas, means)})
    return rows


def verdict(results: Mapping[str, Any]) -> str:
    """Whether two heads beat a tuned single one, in a sentence for every form of them."""
    arms = results["arms"]
    tests = {
        name: [record["test"][best_alpha(records)] for record in records]
        for name, records in arms.items()
    }
    duals = [name for name in tests if name.startswith("dual_")]
    rivals = [name for name in ("single", "kd", "dkd") if name in tests]
    lines = []
    for rival in rivals:
        for dual in duals:
            gain, p = paired(tests[dual], tests[rival])
            # The difference of two runs says nothing about the next one.
            if math.isnan(p):
                said = "no test: one seed each, or as much with every seed"
            elif p >= 0.05:
                said = "NOT distinguishable" if gain > 0 else "does NOT beat it"
            else:
                said = "beats it" if gain > 0 else "is WORSE"
            tested = "" if math.isnan(p) else f", p={p:.2g}"
            lines.append(
                f"- {dual} against tuned {rival}: {100 * gain:+.2f} points{tested}: {said}"
            )
    if len(duals) * len(rivals) > 1 and not all(line.endswith("no test") for line in lines):
        lines.append(
            f"- These are {len(duals) * len(rivals)} comparisons; at 5% each, expect "
            f"{0.05 * len(duals) * len(rivals):.1f} by chance alone."
        )
    return "\n".join(lines)


def write(config: Config, results: Mapping[str, Any], workdir: epath.Path) -> str:
    """Write `report.md` and its plots; returns the text."""
    plots = [_plot_alpha(results, workdir), _plot_diagnostics(results, workdir)]
    seeds = len(next(iter(results["arms"].values())))
    text = "\n\n".join(
        [
            f"# Dual-head distillation on {config.data}",
            f"Teacher {config.teacher}: test {100 * results['teacher']['test'][0]:.2f}%. "
            f"Student {config.student}, {config.epochs} epochs, batch {config.batch_size}, "
            f"{seeds} seed(s). Each arm at the alpha of "
            f"{', '.join(f'{a:g}' for a in config.alpha)} with the best "
            "mean validation accuracy; differences are points of test accuracy, paired by seed.",
            markdown_table(summarise(config, results)),
            "## Does a second head pay?",
            verdict(results) or "No dual arm was run.",
            "## Test accuracy (%) by alpha",
            markdown_table(sensitivity(results)),
            "## Last values of the collapse diagnostics (first seed, chosen alpha)",
            markdown_table(_last_measures(results)),
            "\n".join(f"![{path.stem}]({path.name})" for path in plots),
        ]
    )
    (workdir / "report.md").write_text(text + "\n")
    return text


def _measures(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(epoch, value) of the first seed at the chosen alpha."""
    lane, key = best_alpha(records), f"nc/{name}"
    curves = enumerate(records[0]["curves"], 1)
    return [(epoch, line[key][lane]) for epoch, line in curves if key in line]


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


def _plot_alpha(results: Mapping[str, Any], workdir: epath.Path) -> epath.Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, records in results["arms"].items():
        alphas = records[0]["alphas"]
        test = 100 * np.array([record["test"] for record in records])
        spread = test.std(0, ddof=1) if len(test) > 1 else None
        if len(alphas) == 1 and not alphas[0]:
            axes.axhline(test.mean(), color="black", linestyle=":", label=name)
        else:
            axes.errorbar(alphas, test.mean(0), spread, label=name, marker="o", markersize=3)
    axes.set(xscale="log", xlabel="alpha", ylabel="test accuracy (%)")
    axes.legend(fontsize=7)
    return _save(figure, workdir / "alpha.png")


def _plot_diagnostics(results: Mapping[str, Any], workdir: epath.Path) -> epath.Path:
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 4, figsize=(15, 6.5))
    for axes, measure in zip(grid.flat, diagnostics.MEASURES, strict=True):
        for name, records in results["arms"].items():
            values = _measures(records, measure)
            if values and not (measure == "cosine_head" and "dual" in name):
                axes.plot(*zip(*values), label=name)
        axes.set(title=measure, xlabel="epoch")
        if measure in ("within", "ratio_trunk"):
            axes.set_yscale("log")
    handles, labels = grid.flat[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=7, fontsize=7)
    return _save(figure, workdir / "collapse.png", bottom=0.1)


def _save(figure: Any, path: epath.Path, *, bottom: float = 0.0) -> epath.Path:
    from matplotlib import pyplot

    figure.tight_layout(rect=(0, bottom, 1, 1))
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return path
