"""Records of dual-head runs: right answers by picture, and gradients by epoch and alpha."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.claims.claim import Setting
from experiments.claims.record import Record, make
from experiments.dual_head.report import at, at_edge, best_alpha


def records(setting: Setting, workdir: pathlib.Path) -> Iterator[Record]:
    """A record for each arm and seed of a finished run.

    `ARM` is at its chosen alpha; `ARM@A` at alpha A, with the rate chosen there. Units say what
    values belong to: for a picture or text, whether its answer is right; for an epoch and alpha,
    the cosines and measures of collapse.
    """
    batch = json.loads((workdir / "config.json").read_text())["batch_size"]
    for arm in setting.arms:
        name, _, alpha = arm.partition("@")
        seeds = (workdir / "arms" / name).glob("seed-*")
        paths = sorted(seeds, key=lambda path: int(path.name.partition("-")[2]))
        runs = [json.loads((path / "result.json").read_text()) for path in paths]
        chosen = float(alpha) if alpha else _chosen(setting, runs)
        for seed in range(len(runs)):
            yield _record(setting, runs, arm=arm, seed=seed, alpha=chosen, batch=batch)


def _tried(run: dict[str, Any]) -> dict[float, float]:
    """Validation score of every alpha, at the best rate that a seed tried with it."""
    tried: dict[float, float] = {}
    for alpha, score in zip(run["alphas"], run["validation"]):
        tried[alpha] = max(tried.get(alpha, 0.0), score)
    return tried


def _chosen(setting: Setting, runs: list[dict[str, Any]]) -> float:
    """The best alpha of the choosing seeds; the first of them chose its rate."""
    if setting.choosers == 1:
        return best_alpha(runs)
    tried = [_tried(run) for run in runs[: setting.choosers]]
    return max(tried[0], key=lambda alpha: sum(one[alpha] for one in tried))


def _record(
    setting: Setting, runs: list[dict[str, Any]], *, arm: str, seed: int, alpha: float, batch: int
) -> Record:
    run, first = runs[seed], runs[0]
    if setting.choosers > 1:
        tried = _tried(run)
        validation, chosen = list(tried.values()), list(tried).index(alpha)
    else:
        lanes = [n for n, value in enumerate(first["alphas"]) if "@" not in arm or value == alpha]
        validation = [first["validation"][lane] for lane in lanes]
        chosen = validation.index(max(validation))
    rate = at(first, alpha, "rates")
    edge = at_edge(first, "alphas", alpha) and "@" not in arm
    values: dict[str, Any]
    if setting.units.of == "epoch and alpha":
        values, units = _by_epoch(run)
    else:
        values = {"right": str(at(run, alpha, "right"))}
        units = list(range(setting.units.n))
    return make(
        setting,
        arm,
        seed,
        values,
        units=units,
        examples=setting.updates * batch,
        tried=validation,
        chosen=chosen,
        edge=edge or at_edge(first, "rates", rate),
    )


def _by_epoch(run: dict[str, Any]) -> tuple[dict[str, list[float]], list[str]]:
    """Measures of every epoch that has them, at every alpha with its best rate."""
    score, alphas = run["validation"], run["alphas"]
    best: dict[float, int] = {}
    for lane, alpha in enumerate(alphas):
        if alpha not in best or score[lane] > score[best[alpha]]:
            best[alpha] = lane
    measured = [(epoch, line) for epoch, line in enumerate(run["curves"], 1) if "nc/within" in line]
    names = [name for name in measured[0][1] if name.startswith("nc/")] + ["validation"]
    units = [f"{epoch} {alpha:g}" for epoch, _ in measured for alpha in best]
    values = {
        name.removeprefix("nc/"): [
            line[name][lane] for _, line in measured for lane in best.values()
        ]
        for name in names
    }
    return values, units
