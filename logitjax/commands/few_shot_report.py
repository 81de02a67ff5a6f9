"""The report of `logitjax few-shot`: columns, the best method, and its mistakes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats
from etils import epath

from logitjax import few_shot
from logitjax.commands.pictures import cards_of, write_page
from logitjax.commands.tables import markdown_table

if TYPE_CHECKING:
    from logitjax.commands.few_shot import Problem

# Maximum number of classes in a report.
_CLASSES = 20
# Name of the recommended head.
MIXTURE = "mixture"


def cell(values: Sequence[float]) -> str:
    mean = math.fsum(values) / len(values) if values else 0.0
    return f"{100 * mean:.1f} +- {100 * float(np.std(values)):.1f}"


def columns(problem: "Problem") -> tuple[dict[int, str], list[dict[str, Any]], list[str]]:
    """Names of the columns by shots, the pictures each learns from, and merged columns."""
    names, rows, merged = {}, [], []
    classes, before = len(problem.pictures.class_names), ""
    for shots in sorted(problem.config.shots):
        sample = problem.sample(shots, 0)
        counts = np.bincount(problem.pictures.labels[sample.train], minlength=classes).tolist()
        if str(counts) == before:
            merged.append(f"{shots} a class use the same pictures as {max(names)}.")
            continue
        before = str(counts)
        names[shots] = f"{shots} a class" if min(counts) == shots else f"up to {shots} a class"
        low, high = min(counts), max(counts)
        each = f"{low}" if low == high else f"{low} to {high}"
        chosen, tested = sample.validation, sample.rest
        row = {"column": names[shots], "learned on": f"{len(sample.train)} ({each} a class)"}
        chosen_on = len(problem.validation or chosen) or problem.config.validation
        tested_on = len(tested if problem.test is None else problem.test)
        rows.append(row | {"chosen on": chosen_on, "tested on": tested_on})
    return names, rows, merged


def advised(
    members: Mapping[str, tuple[int, float]], accuracy: float, low: float, high: float
) -> str:
    """The mixture and its expected accuracy in words."""
    parts = sorted(members.items(), key=lambda one: -one[1][1])
    weights = ", ".join(f"{name} ({weight:.2f})" for name, (_, weight) in parts)
    return (
        f"recommended: it adds the probabilities of {weights}, with the settings and weights that "
        "make the labels of the pictures to choose on likeliest. On pictures not used to choose, "
        f"such a mixture is right in {100 * accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    )


def report(
    problem: "Problem",
    chosen: Mapping[str, few_shot.Candidate],
    records: Mapping[str, Mapping[int, Any]],
    left_out: Mapping[str, str],
    heads: Mapping[str, Any],
    advice: tuple[str, str],
) -> str:
    config, (best, reason) = problem.config, advice
    names, sizes, _ = columns(problem)
    most = max(names)

    def row(name: str, part: str, by_shots: Mapping[int, Any]) -> dict[str, Any]:
        cells = {names[n]: cell(record[part]) for n, record in by_shots.items()}
        return {"method": name, **cells}

    # For tuned towers zero-shot is a method.
    first, *_ = records.values()
    rows = [row("zero-shot", "zero_shot", first)] if config.towers == "frozen" else []
    for name, by_shots in records.items():
        cost = {"settings": chosen[name].settings, f"updates at {most}": by_shots[most]["updates"]}
        rows.append(row(name, "test", by_shots) | cost)
    tested = "other pictures" if problem.test else "pictures outside the sample"
    test, _ = problem.tested
    predicted = {name: head.predict(**head.inputs(test)) for name, head in heads.items()}
    parts = [
        "# Few-shot heads",
        f"{len(problem.pictures)} pictures of {len(problem.pictures.class_names)} classes; "
        f"accuracy (%) on {tested}, mean +- standard deviation of {config.samples} samples; "
        f"settings chosen with `{config.validation}`.",
        "\n".join(f"- {note}" for note in problem.notes or ("No problems were found.",)),
        markdown_table(sizes),
        markdown_table(rows),
        f'`{best}` is {reason}; `few_shot.load("heads/{best}")` loads it.',
        *_of_best(test, predicted, best),
    ]
    if left_out:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in left_out.items())
        parts.append(f"Methods that did not run, and what they need: {reasons}.")
    return "\n\n".join(parts) + "\n"


def _of_best(
    test: few_shot.Pictures, predicted: Mapping[str, np.ndarray], best: str
) -> Sequence[str]:
    """Accuracy of the recommended head, heads not distinguishable from it, and mistakes."""
    right = {name: (classes == test.labels).astype(float) for name, classes in predicted.items()}
    score, names = right[best], test.class_names
    low, high = scipy.stats.binomtest(int(score.sum()), len(score)).proportion_ci(method="wilson")
    level = []
    for name, other in right.items():
        gap = other - score
        reach = 1.96 * gap.std() / math.sqrt(len(gap))
        if name != best and abs(gap.mean()) <= reach + 1 / len(gap):
            level.append(f"{name} ({100 * gap.mean():+.1f} +- {100 * reach:.1f})")
    single = max((n for n in right if n != best), key=lambda n: right[n].sum(), default=best)
    classes = []
    for number in np.unique(test.labels).tolist():
        answers = np.bincount(predicted[best][test.labels == number], minlength=len(names))
        hits, total = int(answers[number]), int(answers.sum())
        answers[number] = 0
        label = names[answers.argmax()] if answers.any() else "-"
        row = {"class": names[number], "right": f"{hits} of {total}", "most often taken for": label}
        classes.append((hits / total, row))
    worst = [row for _, row in sorted(classes, key=lambda one: one[0])[:_CLASSES]]
    return [
        f"The head of the first sample gets {int(score.sum())} of {len(score)} pictures right, "
        f"{100 * score.mean():.1f} % [{100 * low:.1f}, {100 * high:.1f}]. Of the methods by "
        f"themselves `{single}` is best, with {int(right[single].sum())}.",
        "Level with it on these pictures (points, and the 95 % interval of the paired difference): "
        + (", ".join(level) or "none")
        + ".",
        f"By class, worst first (at most {_CLASSES}):",
        markdown_table(worst),
    ]


def mistakes(problem: "Problem", head: Any, path: epath.Path) -> None:
    """A page of the pictures that the head classifies wrongly, the most confident first."""
    test, files = problem.tested
    if not files:
        return
    probabilities = head.predict_proba(**head.inputs(test))
    wrong = np.flatnonzero(probabilities.argmax(1) != test.labels)
    order = wrong[np.argsort(-probabilities.max(1)[wrong])]
    cards = cards_of(head, test, files, order, labelled=True)
    text = f"{len(wrong)} of {len(test)} pictures, most confident first."
    write_page(path, "Mistakes", text, cards)
