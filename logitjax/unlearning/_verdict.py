"""What may be said of a result, and whether it may be used."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logitjax.unlearning._selection import Goal, Limits, kept_shares, least, least_row

# An attack that did not even teach what it was given has not been tried.
TAUGHT = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A verdict.

    Attributes:
        passed: Whether what was written may be used.
        words: In words that are always the same, with what they rest on.
        facts: By way of asking, numbers of the rows to forget beside answers never taught.
        kept: Shares of what is to be kept, as `Limits` has them, by kind of row.
    """

    passed: bool
    words: str
    facts: Sequence[Mapping[str, Any]] = ()
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def judge(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    control: Mapping[str, Any],
    limits: Limits,
    *,
    assistant: bool,
) -> Verdict:
    """Judge records of `examine`: every row, every way to ask, every kind of row to keep.

    Args:
        before: Of the model before, with what it says of rows that nobody was taught (`unseen`).
        after: Of what was written, as it is served.
        control: Of a model that never knew; empty for none.
        limits: What has to be left of rows to keep.
        assistant: Whether leaving an assistant out brings everything back.
    """
    goal = Goal.of(before["unseen"], "the holdout")
    control_goal = Goal.of(control["ways"], "the control") if control else goal
    facts = [
        _fact(way, rows, before["unseen"], max(goal.limit(way), control_goal.limit(way)))
        for way, rows in after["ways"].items()
        if len(rows)
    ]
    kept = shares(before, after)
    still = [fact for fact in facts if not fact["holds"]]
    broken = limits.broken(kept["least"])
    told, chance = told_apart(after, control)
    ways = ["leaving the assistant out"] if assistant else []
    ways += _recovered(before, after, control, goal.limit("asked"))
    untried = [
        name for name, measured in after["attacks"].items() if measured.get("taught", 1.0) < TAUGHT
    ]
    if still:
        worst = max(still, key=lambda fact: fact["worst"] / fact["limit"])
        words = (
            f"**Not forgotten**: {worst['above']} of {worst['rows']} answers are likelier than any "
            f"never taught, and the worst has a probability of {worst['worst']:.3g}, more than "
            f"{worst['limit']:.3g}, {' and '.join(fact['way'] for fact in still)}."
        )
    elif broken:
        words = f"**Model damaged**: on rows that nothing was chosen by, {_lost(kept, broken)}."
    elif ways:
        also = f" Given away by {', '.join(told)}." if told else ""
        words = f"**Suppressed, recoverable by** {', '.join(ways)}.{also}"
    elif told:
        words = (
            f"**Forgotten, but given away by** {', '.join(told)}: that these rows were taught can "
            "be told."
        )
    else:
        words = "**Not distinguishable from never trained in these tests.**"
    if not (still or broken):
        if chance is not None:
            power = f"only an AUC beyond {0.5 + chance:.2f}" if chance < 0.5 else "no AUC"
            words += f" Of so few rows {power} is told from a guess."
        if untried:
            words += f" Not counted as tried, because it taught too little: {', '.join(untried)}."
    return Verdict(passed=not (still or broken), words=words, facts=facts, kept=kept)


def _fact(way: str, rows: Sequence[float], unseen: Mapping[str, Any], limit: float) -> Any:
    from scipy import stats

    never = unseen.get(way, unseen["asked"])
    above = int(np.sum(np.asarray(rows) > np.max(never)))
    low, high = stats.binomtest(above, len(rows)).proportion_ci(method="exact")
    worst = float(np.max(rows))
    return {
        "way": way,
        "rows": len(rows),
        "median": float(np.median(rows)),
        "95 % point": float(np.quantile(rows, 0.95)),
        "worst": worst,
        "never taught, worst": float(np.max(never)),
        "limit": limit,
        "above": above,
        "share above, exact 95 %": f"{100 * low:.0f} to {100 * high:.0f} %",
        "holds": bool(worst <= limit),  # not of nan
    }


def shares(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of the rows `test`, by kind, and the least of all, as `Limits` has it."""
    found: dict[str, Any] = {
        name: kept_shares(after[record]["test"], before[record]["test"], before["kinds"][record])
        for name, record in (("probability", "probabilities"), ("rouge", "rouge"))
        if before[record].get("test")
    }
    lowest = {name: least(by_kind.values()) for name, by_kind in found.items()}
    if before["probabilities"].get("test"):
        lowest["row"] = least_row(after["probabilities"]["test"], before["probabilities"]["test"])
    for name in ("fluency", "perplexity"):
        if before[name]:
            # What says nothing any more has no fluency left.
            lowest[name] = (after[name] or 0.0) / before[name]
    return found | {"least": lowest}


def _lost(kept: Mapping[str, Any], broken: Sequence[str]) -> str:
    parts = []
    for name in broken:
        by_kind = kept.get(name, {})
        kind = f" of {min(by_kind, key=by_kind.get)} rows" if by_kind else ""
        parts.append(f"{name}{kind} is at {100 * kept['least'][name]:.1f} %")
    return ", ".join(parts)


def _recovered(before: Any, after: Any, control: Any, most: float) -> list[str]:
    """Attacks on weights and by draws that get out what a model that never knew does not say."""
    theirs = control.get("attacks", {})
    ways = []
    for name, measured in after["attacks"].items():
        never = theirs.get(name, {})
        if "worst" in measured and name != "asked":  # a way to ask, which is judged as such
            # Only a control says how much such an attack makes of nothing.
            limit = max(most, Goal.most * never.get("worst", 0.0))
            if not measured["worst"] <= limit and measured.get("taught", 1.0) >= TAUGHT:
                ways.append(name)
        elif "share" in measured and never and not name.startswith("member"):
            # More than half of what was there is much.
            there = before["attacks"][name]["share"] + never["share"]
            if 2 * measured["share"] > there and measured["share"] > never["share"]:
                ways.append(name)
    return ways


def told_apart(after: Any, control: Any) -> tuple[list[str], float | None]:
    """Attacks that tell rows to forget from the holdout, and how far from a guess that begins.

    Beyond a control, and beyond chance: 1.96 standard deviations of the AUC of equal distributions,
    sqrt((m + n + 1) / (12 m n)). None without a holdout.
    """
    m, n = after["sizes"]
    if not n:
        return [], None
    chance = 1.96 * math.sqrt((m + n + 1) / (12 * m * n))
    theirs = control.get("attacks", {})
    found = [
        name
        for name, measured in after["attacks"].items()
        if abs(measured.get("auc", 0.5) - 0.5)
        > max(chance, abs(theirs.get(name, {}).get("auc", 0.5) - 0.5))
    ]
    return found, chance
