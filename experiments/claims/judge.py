"""Verdicts from records: written into a claim's file, and recomputed by its check."""

import ast
import dataclasses
import operator
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.claims import record as records_of
from experiments.claims import statistics
from experiments.claims.claim import Arithmetic, Claim, Contrast, Effect, Setting, Verdict, rounded
from experiments.claims.record import Record

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}


def compute(arithmetic: Arithmetic) -> list[float]:
    """The formula's result; it may hold only names of inputs, numbers, + - * / ** and brackets.

    Raises:
        ValueError: The formula holds anything else.
    """
    inputs = {name: np.array(values) for name, values in arithmetic.inputs.items()}

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name) if name in inputs:
                return inputs[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
        raise ValueError(f"formula: expected inputs and + - * / **, got {ast.unparse(node)!r}")

    results = np.atleast_1d(value(ast.parse(arithmetic.formula, mode="eval").body))
    return [rounded(float(result)) for result in results]


def validation(records: Sequence[Record]) -> np.ndarray:
    """`[trials]` mean scores of the choosing seeds; empty if nothing was chosen."""
    return np.mean([record.validation for record in records if record.role == "trial"] or [[]], 0)


def _picked(arms: Mapping[str, Sequence[Record]], names: Sequence[str], pick: str) -> str:
    """The best or worst of several arms on the validation data of the unreported seed."""
    if len(names) == 1:
        return names[0]
    scores = {}
    for name in names:
        tried = validation(arms[name])
        if not len(tried):
            raise ValueError(f"{name}: expected a trial that can be chosen by, got none")
        scores[name] = tried.max()
    return (max if pick == "best" else min)(scores, key=lambda name: scores[name])


def estimate(
    contrast: Contrast, setting: Setting, arms: Mapping[str, Sequence[Record]]
) -> statistics.Estimate:
    """The number of a contrast.

    Raises:
        ValueError: An arm, a seed or a unit is missing.
    """

    def values(names: Sequence[str], pick: str, metric: str) -> np.ndarray:
        missing = [name for name in names if name not in arms]
        if missing:
            raise ValueError(f"{setting.records}: expected records of {missing[0]}, got none")
        chosen = arms[_picked(arms, names, pick)]
        reports = [record for record in chosen if record.role == "report"]
        if len(reports) != setting.seeds:
            raise ValueError(
                f"{reports[0].arm if reports else names[0]}: expected {setting.seeds} reported "
                f"seeds, got {len(reports)}"
            )
        return np.stack([record.of(metric) for record in reports])

    first = values(contrast.first, contrast.pick[0], contrast.metric)
    if contrast.correlate is not None:
        first = statistics.spearman(
            values(contrast.first, contrast.pick[0], contrast.correlate), first
        )
    elif contrast.spread:
        other = values(contrast.second, contrast.pick[1], contrast.metric)
        return statistics.spread(first.mean(1), other.mean(1))
    elif contrast.second:
        first = first - values(contrast.second, contrast.pick[1], contrast.metric)
    return statistics.crossed(
        contrast.sign * contrast.scale * (first - contrast.bound), overlap=contrast.overlap
    )


def words(claim: Claim, estimates: Sequence[statistics.Estimate]) -> list[str]:
    """The verdict on every contrast, in the order of the claim's settings."""
    deltas = [contrast.delta for setting in claim.settings for contrast in setting.contrasts]
    return [statistics.word(one, delta) for one, delta in zip(estimates, deltas, strict=True)]


def judge(
    claims: Mapping[str, Claim], folder: pathlib.Path = records_of.RECORDS
) -> dict[str, Claim]:
    """Every claim with the verdict that its records and its arithmetic give.

    A claim without records stays open; one that numbers here cannot decide keeps its verdict.
    """
    entries: dict[str, list[statistics.Estimate]] = {}
    for name, claim in claims.items():
        if claim.settings and all(
            records_of.made(folder / one.records, one) for one in claim.settings
        ):
            entries[name] = [
                estimate(contrast, setting, records_of.read(folder / setting.records))
                for setting in claim.settings
                for contrast in setting.contrasts
            ]
    # Holm over all contrasts of a paper, which were named before any run.
    for prefix in {name.partition("-")[0] for name in entries}:
        paper = [name for name in entries if name.startswith(f"{prefix}-")]
        every = [one for name in paper for one in entries[name]]
        settings = (one for c in claims.values() for one in c.settings if c.id[:2] == prefix)
        missing = sum(len(one.contrasts) for one in settings) - len(every)
        adjusted = iter(statistics.holm([one.p for one in every] + missing * [1.0]))
        for name in paper:
            entries[name] = [dataclasses.replace(one, p=next(adjusted)) for one in entries[name]]
    return {
        name: claim.model_copy(update={"verdict": _verdict(claim, entries.get(name))})
        for name, claim in claims.items()
    }


def _verdict(claim: Claim, estimates: Sequence[statistics.Estimate] | None) -> Verdict:
    why = claim.verdict.why
    if claim.arithmetic is not None:
        results = compute(claim.arithmetic)
        near = [
            abs(result - claimed) <= claim.arithmetic.within
            for result, claimed in zip(results, claim.arithmetic.claimed, strict=True)
        ]
        word = "holds" if all(near) else "refuted"
        return Verdict(word=word, scope="paper", computed=tuple(results), why=why)
    if claim.settings and estimates is None:
        return Verdict(word="open", scope="here", why=why or "Not run.")
    if estimates is None:
        return claim.verdict
    every = words(claim, estimates)
    names = [contrast.name for setting in claim.settings for contrast in setting.contrasts]
    effects = [
        Effect(name=name, **{k: rounded(v) for k, v in dataclasses.asdict(one).items()})
        for name, one in zip(names, estimates, strict=True)
    ]
    # One refuted setting refutes the claim; only all settings together confirm it.
    word = "refuted" if "refuted" in every else "open" if "open" in every else "holds"
    return Verdict(word=word, scope="here", effects=tuple(effects))
