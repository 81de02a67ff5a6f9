"""Attackers of a row of logits, made from the fields that a server's own schema takes.

An attacker asks through an `Asker` and reads intervals of 95 %: of a logit beside another one, or
of a log-probability. `attackers` gives those that know what a field means, where the schema has it,
and for every field of numbers or token ids one that knows nothing: it looks for values where an
answer changes and checks both sides, or has the ids put in order. So a new field is attacked the
day it is added.
"""

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special, stats

from logitjax.leakage import Choice

# Logits are looked for so far below the largest, and count as read where they are known this well.
RANGE, READ, CONFIDENCE = 40.0, 2.0, 0.95
TOP, NORMALISER = -1, -2
COUNTED = ("read", "right", "intervals", "hold", "rare", "rare hold")
_STEPS = 13  # of a bisection: 40 nats to .005
Body = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reply:
    """Tokens of an answer to a body as the server took it, and values of the first one's row."""

    tokens: tuple[int, ...]
    body: Body
    values: Mapping[int, float] = dataclasses.field(default_factory=dict)


class Asker:
    """Asks for bodies at once and counts what is answered; refused ones cost nothing."""

    def __init__(self, ask: Callable[[list[Body]], list[Reply | None]], budget: int):
        self._ask, self.left = ask, budget

    def __call__(self, bodies: Sequence[Body]) -> list[Reply | None]:
        bodies = list(bodies)[: self.left]
        replies = self._ask(bodies) if bodies else []
        self.left -= sum(reply is not None for reply in replies)
        return replies


@dataclasses.dataclass
class Readings:
    """Intervals of `z[i] - z[j]`, j also `TOP` or `NORMALISER`, and nats about anything else."""

    intervals: dict[tuple[int, int], tuple[float, float]] = dataclasses.field(default_factory=dict)
    other: float = 0.0

    def add(self, i: int, j: int, low: float, high: float) -> None:
        old = self.intervals.get((i, j), (-math.inf, math.inf))
        self.intervals[i, j] = (max(low, old[0]), min(high, old[1]))

    def judge(self, row: np.ndarray, noise: float) -> dict[str, Any]:
        """Nats that are right, how often intervals hold, and the narrowest of an unlikely token.

        Logits are `read` where their interval is narrow. `intervals` are all that an attacker says
        beside what it is told, `rare` those of tokens below 1e-3, each with how many `hold`.
        """
        log_p = row - np.logaddexp.reduce(row)
        # Where a context has noise of its own, its row is not the model's.
        wider = 1.96 * math.sqrt(2) * noise
        seen: collections.Counter[str] = collections.Counter(dict.fromkeys(COUNTED, 0))
        narrow, nats = math.inf, 0.0 if noise else self.other
        for (i, j), (low, high) in self.intervals.items():
            truth = log_p[i] if j == NORMALISER else row[i] - (row.max() if j == TOP else row[j])
            width = max(high - low + 2 * wider, 1e-6)
            holds = bool(low - wider - 1e-5 <= truth <= high + wider + 1e-5)
            # Whoever saw a token once knows little of it.
            if width < READ:
                seen.update({"read": 1, "right": int(holds)})
                nats += holds * math.log(RANGE / width)
            if j != NORMALISER:
                seen.update({"intervals": 1, "hold": int(holds)})
                if log_p[i] < math.log(1e-3):
                    seen.update({"rare": 1, "rare hold": int(holds)})
                    narrow = min(narrow, width)
        return {"nats": nats, "narrowest": narrow, **seen}


def _thresholds(
    ask: Asker,
    bodies: Sequence[Callable[[float], Body]],
    low: float,
    high: float,
    above: Callable[[int, Reply], bool],
    steps: int = _STEPS,
    field: str = "",
) -> list[tuple[float, float] | None]:
    """Where `above` turns from true to false, by halving what the server took; None if refused."""
    ends: list[Any] = [(low, high)] * len(bodies)
    for _ in range(steps):
        going = [k for k, end in enumerate(ends) if end is not None]
        if ask.left < len(going):
            break
        middles = [sum(ends[k]) / 2 for k in going]
        for k, at, reply in zip(
            going, middles, ask([bodies[k](at) for k, at in zip(going, middles)]), strict=True
        ):
            if reply is None:
                ends[k] = None
            else:
                at = reply.body.get(field, at)
                ends[k] = (at, ends[k][1]) if above(k, reply) else (ends[k][0], at)
    return ends


def values(ask: Asker, body: Body, vocab: int, **_: Any) -> Readings:
    """Values reported by themselves, and those of drawn, lifted or forced tokens."""
    readings = Readings()

    def take(replies: Sequence[Reply | None], beside: int | None = None) -> int:
        for reply in replies:
            told = {} if reply is None else reply.values
            for i, value in told.items():
                if beside is None:
                    readings.add(i, NORMALISER, value - 1e-5, value + 1e-5)
                elif beside in told and i != beside:
                    gap = value - told[beside]
                    readings.add(i, beside, gap - 1e-4, gap + 1e-4)
        return sum(reply is not None for reply in replies)

    told = [body | {"logprobs": 5, "temperature": 0.0}]
    replies = ask(told)
    take(replies)
    first = 0 if replies[0] is None else replies[0].tokens[0]
    lifts = [{str(i): 50.0 for i in (first, *range(k, k + 4))} for k in range(0, vocab, 4)]
    forced = [body | {"logprobs": 0, "logit_bias": {str(i): 100.0}} for i in range(vocab)]
    cold = body | {"logprobs": 5, "temperature": 0.0}
    probe = ask([cold | {"logit_bias": lifts[0]}, forced[0]])
    if probe[0] is not None and len(set(probe[0].values) & set(map(int, lifts[0]))) > 3:
        take(probe[:1], first)
        take(ask([cold | {"logit_bias": lift} for lift in lifts[1 : ask.left]]), first)
    elif len(probe) > 1 and probe[1] is not None and probe[1].values:
        take(ask(forced))
    else:
        # A drawn token's own value, where it is told; 20 draws decide whether it is.
        drawn = [body | {"logprobs": 0, "temperature": 2.0, "seed": s} for s in range(ask.left)]
        before = len(readings.intervals)
        take(ask(drawn[:20]))
        if len(readings.intervals) > before:
            take(ask(drawn[20:]))
    return readings


def counts(ask: Asker, body: Body, **_: Any) -> Readings:
    """Fresh draws are counted beside the most frequent, by intervals that are exact."""
    # A token counted because it was drawn is found too often: half of the draws choose, half count.
    readings, half = Readings(), ask.left // 2
    for heat in (1.0, 2.0):
        replies = ask([body | {"temperature": heat, "seed": 10**6 + s} for s in range(half)])
        drawn = np.array([reply.tokens[0] for reply in replies if reply is not None], int)
        chosen, often = np.unique(drawn[: len(drawn) // 2], return_counts=True)
        most = chosen[often.argmax()] if len(chosen) else -1
        counted = collections.Counter(drawn[len(drawn) // 2 :].tolist())
        for i in chosen[chosen != most].tolist():
            if (i, int(most)) not in readings.intervals and (both := counted[i] + counted[most]):
                share = stats.binomtest(counted[i], both).proportion_ci(CONFIDENCE, "exact")
                ends = heat * special.logit([share.low, share.high])
                readings.add(i, int(most), *ends.tolist())
    return readings


def _shares_noise(ask: Asker, body: Body, name: str, near: float) -> bool:
    """Whether draws of one seed agree before and after a field moves by next to nothing."""
    moves: tuple[Body, ...] = ({}, {name: near})
    replies = ask([body | {"temperature": 2.0, "seed": s} | m for s in range(15) for m in moves])
    pairs = zip(replies[::2], replies[1::2], strict=True)
    same = [a.tokens == b.tokens for a, b in pairs if a is not None and b is not None]
    return len(same) > 5 and bool(np.mean(same) > 0.9)


def seeds(ask: Asker, body: Body, **_: Any) -> Readings:
    """The noise of one seed is shared: a drawn token stays while `min_p` leaves it."""
    readings, heat = Readings(), 2.0
    if not _shares_noise(ask, body, "min_p", 1e-7):
        return readings
    many = ask.left // (_STEPS + 1)
    drawn = ask([body | {"temperature": heat, "seed": s} for s in range(many)])
    tokens = {r.tokens[0]: s for s, r in enumerate(drawn) if r is not None}

    def asked(seed: int) -> Callable[[float], Body]:
        fixed = body | {"temperature": heat, "seed": seed}
        return lambda gap: fixed | {"min_p": math.exp(gap / heat)}

    order = list(tokens)
    ends = _thresholds(
        ask,
        [asked(s) for s in tokens.values()],
        -RANGE,
        0.0,
        lambda k, reply: reply.tokens[0] == order[k],
    )
    for token, end in zip(order, ends, strict=True):
        if end is not None and end[1] < 0:
            readings.add(token, TOP, *end)
    return readings


def certificates(ask: Asker, body: Body, **_: Any) -> Readings:
    """A token drawn under `min_p` has passed it; one that misses where it would come has not."""
    readings, heat = Readings(), 2.0
    levels = (-0.5 * np.arange(12)).tolist()
    each = ask.left // len(levels)
    low: Any = {}
    sure: list[float] = []
    for level in levels:
        cut = {"temperature": heat, "min_p": math.exp(level / heat)}
        replies = ask([body | cut | {"seed": 10**6 + s} for s in range(each)])
        tokens = [reply.tokens[0] for reply in replies if reply is not None]
        if not tokens:
            continue
        often = np.unique(tokens, return_counts=True)[1].max()
        # A token that is just kept comes with at least so much of the most frequent one's share.
        least = stats.beta.ppf(0.005, often, len(tokens) - often + 1) * math.exp(level / heat)
        sure += [level] if (1 - least) ** len(tokens) < 0.02 else []
        low = dict.fromkeys(tokens, level) | low
    for token, level in low.items():
        above = min((missed for missed in sure if missed > level), default=0.0)
        readings.add(token, TOP, level, above)
    return readings


def _enum(words: Sequence[str]) -> Body:
    schema = {"json_schema": {"schema": {"enum": list(words)}}}
    return {"response_format": {"type": "json_schema"} | schema, "temperature": 0.0}


def orders(ask: Asker, body: Body, letters: Mapping[str, int], **_: Any) -> Readings:
    """At temperature 0 a schema asks which of its tokens is the likeliest, again and again."""
    readings, left = Readings(), list(letters)
    while len(left) > 1 and ask.left:
        (reply,) = ask([body | _enum(left) | {"max_tokens": 2}])
        best = [c for c in left if reply is not None and reply.tokens[-1] == letters[c]]
        if not best:
            break
        readings.other += math.log(len(left))
        left.remove(best[0])
    return readings


def penalties(ask: Asker, body: Body, letters: Mapping[str, int], **_: Any) -> Readings:
    """At temperature 0 a schema has a token written thrice, and a penalty weighs the fourth."""
    readings, names = Readings(), list(letters)
    pairs = [(names[k], b) for k in range(len(names)) for b in names[k + 1 :]][: ask.left // _STEPS]

    def asked(a: str, b: str) -> Callable[[float], Body]:
        fixed = body | _enum([a * 4, a * 3 + b]) | {"max_tokens": 5}
        return lambda penalty: fixed | {"frequency_penalty": penalty}

    ends = _thresholds(
        ask,
        [asked(a, b) for a, b in pairs],
        -2.0,
        2.0,
        lambda k, reply: reply.tokens[-1] == letters[pairs[k][0]],
        field="frequency_penalty",
    )
    for (a, b), end in zip(pairs, ends, strict=True):
        # At an end of the range nothing is enclosed.
        if end is not None and end[0] > -2 and end[1] < 2:
            readings.add(letters[a], letters[b], 3 * end[0], 3 * end[1])
    return readings


def biases(ask: Asker, body: Body, vocab: int, **_: Any) -> Readings:
    """At temperature 0 a bias lifts a token until it is the likeliest."""
    readings = Readings()
    some = np.random.default_rng(0).choice(vocab, min(vocab, ask.left // _STEPS), replace=False)
    fixed = body | {"temperature": 0.0}
    ends = _thresholds(
        ask,
        [lambda b, i=i: fixed | {"logit_bias": {str(i): b}} for i in some],
        0.0,
        RANGE,
        lambda k, reply: reply.tokens[0] != some[k],
    )
    for i, end in zip(some.tolist(), ends, strict=True):
        if end is not None:
            readings.add(i, TOP, -end[1], -end[0])
    return readings


def numeric(
    ask: Asker, body: Body, vocab: int, name: str, low: float, high: float, whole: bool, **_: Any
) -> Readings:
    """A field of unknown meaning: where answers of one seed change, checked on both sides."""
    readings, heat = Readings(), {} if name == "temperature" else {"temperature": 2.0}
    base = body | heat | ({} if name == "max_tokens" else {"max_tokens": 2})
    high, make = (min(high, float(vocab)), round) if whole else (high, float)
    steps = math.ceil(math.log2(high - low)) if whole else _STEPS
    seeds = range(20, 20 + ask.left // (steps + 8))
    replies = ask([base | {"seed": s, name: make(at)} for s in seeds for at in (low, high)])
    pairs = zip(replies[::2], replies[1::2], [base | {"seed": s} for s in seeds], strict=False)
    fixed_fields = [(a, fixed) for a, b, fixed in pairs if a and b and not _agree(a, b)]
    bodies = [lambda x, fixed=fixed: fixed | {name: make(x)} for _, fixed in fixed_fields]
    thresholds = _thresholds(
        ask, bodies, low, high, lambda k, reply: _agree(reply, fixed_fields[k][0]), steps
    )
    for asked, end in zip(bodies, thresholds, strict=True):
        if end is None or (whole and end[1] - end[0] > 1):
            continue
        gap = 1.0 if whole else end[1] - end[0]
        # Draws that are fresh for each value agree on neither side.
        sides = [end[0] - 3 * gap, end[0] - gap, end[0], end[1], end[1] + gap, end[1] + 3 * gap]
        inside = low <= sides[0] and sides[-1] <= high
        replies: Any = ask([asked(x) for x in sides]) if inside else []
        if None in replies or len({reply.body[name] for reply in replies if reply}) < 6:
            continue
        left, right = replies[:3], replies[3:]
        if all(_agree(left[0], r) != _agree(right[0], r) for r in left + right):
            taken = right[0].body[name] - left[-1].body[name]
            readings.other += math.log((high - low) / taken)
    return readings


def _agree(one: Reply, two: Reply) -> bool:
    size = min(len(one.tokens), len(two.tokens))
    return one.tokens[:size] == two.tokens[:size]


def listed(ask: Asker, body: Body, vocab: int, name: str, **_: Any) -> Readings:
    """A field of token ids, of unknown meaning: where it allows them, they are put in order."""
    readings, fixed = Readings(), body | {"temperature": 0.0}
    left = np.random.default_rng(0).choice(vocab, min(vocab, ask.left, 500), replace=False).tolist()
    while len(left) > 1 and ask.left:
        (reply,) = ask([fixed | {name: left}])
        if reply is None or reply.tokens[0] not in left:
            break
        left.remove(reply.tokens[0])
        readings.other += math.log(len(left) + 1)
    return readings


_KNOWN: tuple[tuple[Callable[..., Readings], frozenset[str]], ...] = (
    (values, frozenset({"logprobs"})),
    (counts, frozenset({"temperature", "seed"})),
    (seeds, frozenset({"temperature", "seed", "min_p"})),
    (certificates, frozenset({"temperature", "seed", "min_p"})),
    (orders, frozenset({"response_format"})),
    (penalties, frozenset({"response_format", "frequency_penalty"})),
    (biases, frozenset({"logit_bias"})),
)


def attackers(schema: Mapping[str, Any]) -> dict[str, Callable[..., Readings]]:
    """Attackers by name: those whose fields a JSON schema of requests has, one a field."""
    fields = schema["properties"]
    attacks = {a.__name__: a for a, needed in _KNOWN if needed <= fields.keys()}
    for name, field in fields.items():
        for kind in field.get("anyOf", [field]):
            if kind.get("items", {}).get("type") == "integer" and name != "prompt":
                attacks[f"field {name}"] = functools.partial(listed, name=name)
            if kind.get("type") not in ("integer", "number"):
                continue
            low = kind.get("minimum", kind.get("exclusiveMinimum", -100) + 1e-6)
            high = kind.get("maximum", 100)
            whole = kind["type"] == "integer"
            if high - low <= 1 and kind["type"] == "integer":
                continue
            options = {"name": name, "low": float(low), "high": float(high), "whole": whole}
            attacks[f"field {name}"] = functools.partial(numeric, **options)
    return attacks


def spelled(body: Body) -> str:
    """A body as the one who charges for it knows it."""
    return json.dumps(body, sort_keys=True)


def choice_of(body: Body) -> Choice:
    """How a body has its tokens chosen."""
    names = [field.name for field in dataclasses.fields(Choice)]
    return Choice(**{name: body[name] for name in names if name in body})
