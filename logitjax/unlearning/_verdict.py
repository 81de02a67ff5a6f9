"""Verdicts on a result, and whether it may be used."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from logitjax.unlearning._selection import Goal, Limits, kept_shares, least_kind, least_row

# A relearning attack that fails to teach its own rows proves nothing.
TAUGHT = 0.9
# How often all attacks together may raise a false alarm, and detect a true difference.
_LEVEL, _POWER, _DRAWS, _EXACT = 0.05, 0.8, 500, 1600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A verdict: whether the written files may be used, in one of six fixed phrasings."""

    passed: bool
    words: str
    # Rows to forget beside answers that were never taught, by way of asking.
    facts: Sequence[Mapping[str, Any]] = ()
    # Shares kept, by kind of row.
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def judge(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    controls: Sequence[Mapping[str, Any]],
    limits: Limits,
    *,
    assistant: bool,
) -> Verdict:
    """Judge records of `examine`: every row, every way of asking, every kind of row to keep.

    Args:
        before: Record of the model before, including answers to rows on which it was never
            trained (`unseen`).
        after: Record of the written model, as it is served.
        controls: Records of models that never learned the rows; an attack counts only if it
            does better on the written model than on all of them.
        assistant: Whether leaving an assistant out recovers everything.
    """
    goals = [Goal.of(before["unseen"], "the holdout")]
    goals += [Goal.of(control["ways"], "a control") for control in controls]
    facts = [
        _fact(way, rows, before["unseen"], max(goal.limit(way) for goal in goals))
        for way, rows in after["ways"].items()
        if len(rows)
    ]
    kept = shares(before, after)
    still = [fact for fact in facts if not fact["holds"]]
    broken = limits.broken(kept["least"])
    notes, chance = told_apart(after, controls)
    ways = ["leaving the assistant out"] if assistant else []
    ways += _recovered(before, after, controls, goals[0].limit("asked"))
    untried = [
        name for name, measured in after["attacks"].items() if measured.get("taught", 1.0) < TAUGHT
    ]
    if still:
        worst = max(still, key=lambda fact: fact["worst"] / fact["limit"])
        words = (
            f"**Not forgotten**: {worst['above']} of {worst['rows']} answers are more likely than "
            f"any never taught. The worst has a probability of {worst['worst']:.3g}, above "
            f"the limit of {worst['limit']:.3g}. Ways of asking above their limit: "
            f"{', '.join(fact['way'] for fact in still)}."
        )
    elif broken:
        words = f"**Model damaged**: on rows not used for the choice, {_lost(kept, broken)}."
    elif ways:
        also = f" Also given away by {', '.join(notes)}." if notes else ""
        words = f"**Suppressed, recoverable by** {', '.join(ways)}.{also}"
    elif notes:
        words = (
            f"**Forgotten, but given away by** {', '.join(notes)}, which can tell that these rows "
            "were taught."
        )
    else:
        words = "**Not distinguishable from never trained in these tests.**"
    if not (still or broken):
        if chance is not None:
            m, n = after["sizes"]
            words += f" {_power(m, n, chance)}"
        if controls:
            count = len(controls)
            words += f" By chance, an attack exceeds all controls ({count}) once in {count + 1} "
            words += "cases."
        if untried:
            words += f" Not counted, because the attack taught too little: {', '.join(untried)}."
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
    """Shares kept of the rows `test`, by kind, and the smallest of each measure in `Limits`."""
    entries: dict[str, Any] = {
        name: kept_shares(after[record]["test"], before[record]["test"], before["kinds"][record])
        for name, record in (("probability", "probabilities"), ("rouge", "rouge"))
        if before[record].get("test")
    }
    lowest = {name: least_kind(by_kind) for name, by_kind in entries.items()}
    if before["probabilities"].get("test"):
        lowest["row"] = least_row(after["probabilities"]["test"], before["probabilities"]["test"])
    for name in ("fluency", "perplexity"):
        if before[name]:
            # A model that generates nothing has no fluency left.
            lowest[name] = (after[name] or 0.0) / before[name]
    return entries | {"least": lowest}


def _lost(kept: Mapping[str, Any], broken: Sequence[str]) -> str:
    parts = []
    for name in broken:
        least = kept["least"][name]
        kinds = [kind for kind, share in kept.get(name, {}).items() if share == least]
        kind = f" of {kinds[0]} rows" if kinds else ""
        parts.append(f"{name}{kind} is at {100 * least:.1f} %")
    return ", ".join(parts)


def _recovered(before: Any, after: Any, controls: Any, most: float) -> list[str]:
    """Attacks by weights or samples that recover answers which the controls do not give."""
    ways = []
    for name, measured in after["attacks"].items():
        never = _never(controls, name)
        # `asked` is judged with the ways of asking.
        if "worst" in measured and name != "asked":
            # Only a control shows what such an attack invents if nothing was learned.
            limit = max(most, Goal.most * never("worst"))
            if not measured["worst"] <= limit and measured.get("taught", 1.0) >= TAUGHT:
                ways.append(name)
        elif "share" in measured and controls and not name.startswith("member"):
            # Recovered means more than half of what the model knew before.
            present = before["attacks"][name]["share"] + never("share")
            if 2 * measured["share"] > present and measured["share"] > never("share"):
                ways.append(name)
    return ways


def _never(controls: Any, name: str) -> Callable[[str], float]:
    """The largest value of an attack on models that never knew the rows."""
    records = [control["attacks"].get(name, {}) for control in controls]
    return lambda measured: max((record.get(measured, 0.0) for record in records), default=0.0)


def told_apart(after: Any, controls: Any) -> tuple[list[str], float | None]:
    """Attacks that distinguish rows to forget from the holdout, and the distance from 0.5 needed.

    An AUC has to exceed that of all controls, and what all attacks together reach by chance in 5 %
    of cases. The distance is None without a holdout.
    """
    m, n = after["sizes"]
    if not n:
        return [], None
    aucs = {name: one["auc"] for name, one in after["attacks"].items() if "auc" in one}
    chance = chance_auc(m, n, _LEVEL / max(1, len(aucs)))

    def beyond(name: str) -> float:
        records = [control["attacks"].get(name, {}) for control in controls]
        return max((abs(record.get("auc", 0.5) - 0.5) for record in records), default=0.0)

    items = [
        name for name, auc in aucs.items() if abs(auc - 0.5) > max(chance - 1e-9, beyond(name))
    ]
    return items, chance


@functools.cache
def chance_auc(m: int, n: int, level: float) -> float:
    """The distance from 0.5 that an AUC of m and n rows needs, all orders equally likely."""
    if m * n > _EXACT:  # normal, to a half percent
        return NormalDist().inv_cdf(1 - level / 2) * math.sqrt((m + n + 1) / (12 * m * n))
    # How many orders have each number of pairs: prod (1 - q^(n + i)) / (1 - q^i), i = 1 to m.
    orders = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for k in range(m * n, n + i - 1, -1):
            orders[k] -= orders[k - n - i]
        for k in range(i, m * n + 1):
            orders[k] += orders[k - i]
    total, tail, least = sum(orders), 0, math.inf
    for pairs in range(m * n, m * n // 2, -1):
        tail += orders[pairs]
        if 2 * tail > level * total:
            break
        least = pairs / (m * n) - 0.5
    return least


def _power(m: int, n: int, chance: float) -> str:
    """The AUC that is significant for this many rows, and the true one detected in 80 %."""
    if math.isinf(chance):
        return f"{m} rows and {n} of the holdout are too few for any AUC to be significant."
    rng = np.random.default_rng(0)
    draws = max(20, _DRAWS * _EXACT // max(_EXACT, m * n))
    members, others = rng.normal(size=(draws, m, 1)), rng.normal(size=(draws, 1, n))
    result = "no true AUC"
    for auc in np.arange(0.55, 1.0, 0.01):
        # Normal losses whose means are this far apart have this AUC.
        apart = math.sqrt(2) * NormalDist().inv_cdf(float(auc))
        seen = (members < others + apart).mean((1, 2)) - 0.5
        if (np.abs(seen) > chance - 1e-9).mean() >= _POWER:
            result = f"a true AUC of {auc:.2f}"
            break
    return (
        f"With so few rows, only an AUC of at least {0.5 + chance:.2f} is significant, and "
        f"{result} is detected in four cases of five."
    )
