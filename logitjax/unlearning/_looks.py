"""Evaluations of candidates: the strength that meets the goal, and the shares kept there."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from logitjax.evaluation import fluency
from logitjax.unlearning._selection import (
    Goal,
    Limits,
    kept_shares,
    least_kind,
    least_row,
    least_share,
    matched_strength,
)
from logitjax.unlearning._training import Training, name_of
from logitjax.unlearning._ways import WAYS, search
from logitjax.unlearning.assistant._deployed import Deployed
from logitjax.unlearning.measures._examine import unseen

# 8 % apart, because a sixth more of the assistant lowered the worst answer to a third.
_ALPHAS, _RATIO = 60, 1.08


class Looks:
    """Answers of the model before and with each candidate, on validation rows."""

    def __init__(self, training: Training, before_file: epath.Path):
        self.training, self._before_file = training, before_file
        self.questions, self.config = training.questions, training.config

    @functools.cached_property
    def before(self) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            model, questions = Deployed(model=self.training.model), self.questions
            answers = questions.answers(model, "validation")
            return {
                "probabilities": {
                    part: questions.probabilities(model, part).tolist()
                    for part in ("validation", "forget")
                },
                "unseen": unseen(model, questions),
                "rouge": questions.likeness(answers, "validation").tolist(),
                "fluency": fluency(answers),
                "perplexity": questions.perplexity(model, "validation"),
            }

        return self.training.record(self._before_file, measure)

    @functools.cached_property
    def goal(self) -> Goal:
        source = "answers of the holdout, which nobody was taught"
        if not self.questions.rows["holdout"]:
            source = "each other's answers to the questions to forget"
        return Goal.of(self.before["unseen"], source)

    @property
    def excess_before(self) -> float:
        return self.goal.excess({"asked": self.before["probabilities"]["forget"]})["asked"]

    def meets(self, candidate: Mapping[str, Any]) -> bool:
        return not candidate["broken"] and self.goal.met(candidate["excess"])

    def leaks(self, excess: Mapping[str, float]) -> list[str]:
        return [way for way, result in excess.items() if not self.goal.met(result)]

    def look(self, number: int, step: int, ways: Sequence[str]) -> dict[str, Any]:
        at = {"round": number, "step": step}
        make = functools.partial(self._look, at, ways)
        return self.judged(self.training.record(f"{name_of(at)}.json", make))

    def judged(self, record: Mapping[str, Any], limits: Limits | None = None) -> dict[str, Any]:
        """The record, with the smallest share kept and the limits that it violates."""
        if record.get("broken") == ["finite"]:
            return dict(record)
        broken = list((limits or self.config.limits).halved().broken(record))
        return dict(record) | {"least": least_share(record), "broken": broken}

    def heard(self, candidate: Mapping[str, Any]) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            model = self.training.at(self.training.read(candidate), candidate["strength"])
            answers, before = self.questions.answers(model, "validation"), self.before
            kinds = [row.kind for row in self.questions.rows["validation"] if row.asks]
            rouge = self.questions.likeness(answers, "validation")
            return dict(candidate) | {
                "rouge": least_kind(kept_shares(rouge, before["rouge"], kinds)),
                "fluency": _ratio(fluency(answers), before["fluency"]),
            }

        return self.judged(self.training.record(f"{name_of(candidate)}-answers.json", make))

    def searched(self, candidate: Mapping[str, Any]) -> list[str]:
        """Combinations of ways that elicit answers which each way alone does not."""
        tried: dict[str, float] = {}
        # Two searches; the second runs only if the first found nothing.
        for again in (0, 1):
            make = functools.partial(self._tries, candidate, dict(tried))
            tried |= self.training.record(f"{name_of(candidate)}-search-{again}.json", make)
            if leaks := self.leaks(tried):
                return leaks
        return []

    def _tries(self, candidate: Mapping[str, Any], tried: Mapping[str, float]) -> dict[str, float]:
        model = self.training.at(self.training.read(candidate), candidate["strength"])

        def excess(way: str) -> float | None:
            rows = self.questions.probabilities(model, "forget", way)
            return self._goal_in([way]).excess({way: rows})[way] if len(rows) else None

        return search(excess, candidate["ways"], self.config.budget, tried)

    def _goal_in(self, ways: Sequence[str]) -> Goal:
        """The goal, with unseen answers asked in combinations of ways as well."""
        part = "holdout" if self.questions.rows["holdout"] else "wrong"
        model, worst = Deployed(model=self.training.model), dict(self.goal.worst)
        for way in (way for way in ways if way not in WAYS):
            rows = self.training.record(
                f"candidates/unseen {way}.json",
                lambda way=way: self.questions.probabilities(model, part, way).tolist(),
            )
            if rows:
                worst[way] = Goal.of({"asked": rows}, "").worst["asked"]
        return dataclasses.replace(self.goal, worst=worst)

    def _look(self, at: Mapping[str, Any], ways: Sequence[str]) -> dict[str, Any]:
        """The strength that meets the goal after `step` steps, and the shares kept there."""
        trained, questions, before = self.training.read(at), self.questions, self.before
        goal, method = self._goal_in(ways), self.config.method
        # Rows and paraphrases, each, in every way.
        rows_of = {w: rows for w in {**WAYS, **dict.fromkeys(ways)}
                 if (rows := questions.in_way("forget", w))}  # fmt: skip
        if questions.rows["reworded"]:
            rows_of["in words chosen by"] = questions.encoded["reworded"]
        last: dict[str, float] = {}
        looked: dict[float, dict[str, np.ndarray]] = {}

        def excess(strength: float, *, whole: bool = False) -> float:
            # The way that elicits most comes first: what misses the goal needs no others.
            model, entries = self.training.at(trained, strength), looked.setdefault(strength, {})
            try:
                for way in sorted(rows_of, key=lambda way: -last.get(way, 0.0)):
                    if way not in entries:
                        entries[way] = np.exp(-questions.mean_nll(model, rows_of[way]))
                    last[way] = goal.excess({way: entries[way]})[way]
                    if not whole and not goal.met(last[way]):
                        break
            except ValueError as error:  # losses that are not finite
                logging.warning("step %d, strength %.3g: %s", at["step"], strength, error)
                return float("nan")
            return max(goal.excess(entries).values())

        if method.assistant:
            alphas = method.most_strength * _RATIO ** -np.arange(_ALPHAS)[::-1].astype(np.float32)
            model = self.training.at(trained, 1.0)
            # One file each: together they take long, and a kill should not lose them.
            curves = {
                way: np.asarray(self.training.record(
                    f"{name_of(at)}-{way}.json",
                    lambda rows=rows: questions.by_alpha(model, rows, alphas).tolist(),
                ))
                for way, rows in rows_of.items()
            }  # fmt: skip
            columns = [{way: rows[i] for way, rows in curves.items()} for i in range(len(alphas))]
            curve = np.asarray([np.max([*goal.excess(column).values()]) for column in columns])
            # The smallest strength that meets the goal, interpolated between two in logarithms.
            at_goal = np.flatnonzero(curve <= goal.aim)
            which = int(at_goal[0] if len(at_goal) else np.argmin(np.nan_to_num(curve, nan=1e9)))
            ends, share = np.log(curve[max(which - 1, 0) : which + 1]), 1.0
            if len(at_goal) and len(ends) == 2 and np.isfinite(ends).all():
                share = (ends[0] - np.log(goal.aim)) / (ends[0] - ends[1])

            def between(values: np.ndarray) -> Any:
                return values[which - 1] ** (1 - share) * values[which] ** share

            strength, result = float(between(alphas)), float(between(curve))
            entries = {way: between(rows) for way, rows in curves.items()}
        else:
            most = method.most_strength
            strength, result = matched_strength(excess, goal, most=most, without=self.excess_before)
            if np.isfinite(result):
                result = excess(strength, whole=True)
            entries = looked.get(strength, {})
        if not np.isfinite(result):
            return diverged(at)
        model = self.training.at(trained, strength)
        kinds = [row.kind for row in questions.rows["validation"]]
        kept = questions.probabilities(model, "validation"), before["probabilities"]["validation"]
        shares = kept_shares(*kept, kinds)
        return dict(at) | {
            "files": self.training.files(at),
            "strength": strength,
            "forget": float(np.median(entries["asked"])),
            "worst": float(max(map(np.max, entries.values()))),
            "excess": result,
            "ways": goal.excess(entries),
            "gap": goal.gap(result),
            "kinds": shares,
            "probability": least_kind(shares),
            "row": least_row(*kept),
            "perplexity": _ratio(questions.perplexity(model, "validation"), before["perplexity"]),
        }


def diverged(at: Mapping[str, Any]) -> dict[str, Any]:
    # Worse than any finite value, and still valid JSON.
    worst = 1e9
    nothing = dict(strength=0.0, forget=0.0, excess=worst, gap=worst, probability=0.0, least=0.0)
    return dict(at) | nothing | {"ways": {}, "broken": ["finite"]}


def _ratio(after: float | None, before: float | None) -> float | None:
    return None if after is None or not before else after / before
