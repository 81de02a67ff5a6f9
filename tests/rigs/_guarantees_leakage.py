"""Rows of models whose width is known, for `leakage.estimate_output_subspace` to judge.

A case is a head, hidden states of an even or uneven spectrum, and what an API does to the rows:
rounding to float32, noise, an output bias, tokens without a value. The interval has to hold the
width, and what is called certain has to be right; a direction above the floor that an interval
names may not be missing from it. The same rows are given to what others use:
the largest gap, the optimal hard threshold, and parallel analysis.

Sixty APIs more, of `tests.leakage.apis`, disturb rows by jitter from 1e-7 to 1e-2 and by every
lattice: no more intervals than one in a hundred may miss the width. And toy servers, of
`tests.leakage.servers`, are audited that are not what they are said to be: no false row may be
certified.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from experiments.shared import suite
from logitjax import leakage
from tests.leakage import apis, servers
from tests.rigs import _tables

KINDS = _tables.read("guarantees.toml")["leakage"]


def run(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """One row a case: the interval, what others say, and the case itself in short."""
    rng = np.random.default_rng(seed)
    if kind == "60 APIs":
        return [_api(apis.APIS[i % len(apis.APIS)], rng) for i in rng.integers(0, 60, count)]
    if kind == "toy servers":
        names = list(servers.KINDS)
        return [_audited(names[i % len(names)], int(rng.integers(2**31))) for i in range(count)]
    return [_case(kind, rng) for _ in range(count)]


def _api(api: tuple[str, str], rng: np.random.Generator) -> dict[str, Any]:
    case = apis.draw(api, rng)
    width = leakage.estimate_output_subspace(case.rows, noise=case.named).width
    wrong = apis.violates(case, width)
    return {
        "api": ", ".join(api),
        "violates": wrong,
        "closed": width.upper is not None,
        "about": f"{case.about}: {width}, {width.reason}" if wrong else "",
    }


def _audited(name: str, seed: int) -> dict[str, Any]:
    server = servers.Server(name, seed)
    audit = leakage.audit(server, np.arange(16)[:, None], servers.VOCAB)
    return {
        "api": name,
        "violates": servers.is_false(server, audit),
        "closed": not audit.unlike and audit.row is not None,
        "about": f"seed {seed}",
    }


def _case(kind: str, rng: np.random.Generator) -> dict[str, Any]:
    few = kind == "fewer rows than wide"
    least = 1.1 if kind in ("exact", "low rank", "NaN or -inf") else 0.5
    per_width = math.exp(
        rng.uniform(math.log(0.5 if few else least), math.log(0.95 if few else 60))
    )
    width = int(rng.choice((8, 12, 20, 32) if per_width < 20 else (8, 12, 20)))
    vocab = int(rng.choice((500, 1000, 2000)))
    rows = math.ceil(per_width * width)
    uneven = float(10 ** rng.uniform(0, 3)) if rng.random() < 0.7 else 1.0
    exact = kind in ("exact", "NaN or -inf") or (
        kind in ("output bias", "low rank", "fewer rows than wide") and rng.random() < 0.5
    )
    sigma = 0.0 if exact else float(10 ** rng.uniform(-2, 0.3))
    scales = uneven ** (-np.arange(width) / max(1, width - 1))
    if kind == "weak behind strong":
        scales = np.where(np.arange(width) < 0.75 * width, 1.0, 0.02)
    truth = width
    if kind == "low rank":
        truth = int(rng.integers(4, width))
        scales[truth:] = 0.0
    states = rng.standard_normal((rows, width)) * scales
    if rng.random() < 0.3:  # a direction that all prompts share, as real models have
        states[:, 0] *= 30.0
        states[:, 0] += states[:, 0].std()
    logits = states @ rng.standard_normal((width, vocab))
    logits *= 2.5 / logits.std()
    if kind == "output bias":
        logits = logits + 2.5 * rng.standard_normal(vocab)
    centre = bool(rng.random() < 0.5)
    if centre:
        logits = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    if kind == "pure noise":
        truth, logits, sigma = 0, np.zeros_like(logits), max(sigma, 0.1)
    clean = logits
    logits = logits + sigma * rng.standard_normal(logits.shape)
    if kind == "another noise":
        logits, sigma = _other_noise(logits, sigma, rng)
    table = logits.astype(np.float32)
    if kind == "NaN or -inf":
        gone = rng.choice(vocab, int(rng.integers(1, vocab // 10)), replace=False)
        table[:, gone] = -np.inf
        table[rng.integers(rows), gone[: len(gone) // 2]] = np.nan
    named = None
    if kind == "noise 30 % off":
        named = sigma * float(rng.choice((0.7, 1.3)))
    elif kind == "noise known" or (few and rng.random() < 0.5):
        named = sigma
    subspace = leakage.estimate_output_subspace(table, noise=named, centre=centre)
    width_of = subspace.width
    case = {
        "h": truth,
        "n / h": rows / width,
        "n": rows,
        "V": vocab,
        "uneven": uneven,
        "noise": sigma,
        "centre": centre,
        "lower": width_of.lower,
        "estimate": width_of.estimate,
        "upper": width_of.upper,
        "certain": width_of.certain,
        "floor": width_of.floor,
        "reason": width_of.reason,
    }
    if width_of.upper is not None and sigma and kind != "another noise":
        strengths = _values(clean - centre * clean.mean(axis=1, keepdims=True))
        case["missed above floor"] = max(
            0, int((strengths > width_of.floor).sum()) - width_of.upper
        )
    if np.isfinite(table).all():
        case |= _others(table, subspace.singular_values, centre, rng)
    return case


def _other_noise(
    logits: np.ndarray, sigma: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """bfloat16, noise of a size for each token, for each row, or of heavy tails."""
    kind = rng.integers(4)
    if kind == 0:
        steps = 2.0 ** (np.floor(np.log2(np.abs(logits) + 1e-30)) - 7)
        return np.round(logits / steps) * steps, sigma
    if kind == 3:
        return logits + sigma * rng.standard_t(3, logits.shape), sigma
    size = np.exp(rng.standard_normal(logits.shape[1] if kind == 1 else (len(logits), 1)))
    return logits + sigma * size * rng.standard_normal(logits.shape), sigma


def _others(
    table: np.ndarray, values: np.ndarray, centre: bool, rng: np.random.Generator
) -> dict[str, Any]:
    rows = table.astype(np.float64)
    if centre:
        rows = rows - rows.mean(axis=1, keepdims=True)
    return {
        "largest gap": int(np.argmax(-np.diff(np.log(values)))) + 1,
        "Gavish-Donoho": gavish_donoho(values, *rows.shape),
        "parallel analysis": parallel_analysis(rows, rng),
    }


def gavish_donoho(values: np.ndarray, rows: int, columns: int) -> int:
    """Values above omega(beta) times the median, of unknown noise: Gavish, Donoho (2014), eq. 5."""
    beta = min(rows, columns) / max(rows, columns)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return int((values > omega * np.median(values)).sum())


def parallel_analysis(rows: np.ndarray, rng: np.random.Generator, draws: int = 2) -> int:
    """First values that exceed those of the rows with every column shuffled by itself.

    Horn, 1965; Buja and Eyuboglu, 1992, for the permutations. Prompts are centred, as is usual:
    a column's mean survives its shuffle.
    """
    rows = rows - rows.mean(axis=0)
    values = _values(rows)
    null = np.max([_values(rng.permuted(rows, axis=0)) for _ in range(draws)], axis=0)
    below = np.flatnonzero(values <= null)
    return int(below[0]) if len(below) else len(values)


def _values(rows: np.ndarray) -> np.ndarray:
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))


#: Kinds beyond the 1,000 cases: no source has bounds for the first; the second is the limit of all.
_BEYOND = ("another noise", "weak behind strong")
#: Kinds with the share of their cases that may be wrong.
_MORE = {"60 APIs": 0.01, "toy servers": 0.0}
_OTHERS = ("largest gap", "Gavish-Donoho", "parallel analysis")


def report(cases: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    """A row a kind, and the promises."""
    rows, promises = _more(cases)
    cases = [case for case in cases if case["kind"] not in _MORE]
    for kind in dict.fromkeys(case["kind"] for case in cases):
        some = [case for case in cases if case["kind"] == kind]
        outside = [case for case in some if not _holds(case)]
        rows.append(
            {
                "area": "leakage",
                "kind": kind,
                "cases": len(some),
                "violations": sum(map(_violates, some)),
                "certain": _share(case["certain"] for case in some),
                "refused": _share(case["estimate"] is None for case in some),
                "coverage": 1 - len(outside) / len(some),
                "median interval / h": float(np.median([_length(case) for case in some])),
                "missed above floor": sum(case.get("missed above floor", 0) > 0 for case in some),
                "worst at": _worst(outside),
                "off: ours": _share(_misses(case, "estimate") for case in some),
                **{
                    f"off: {name}": _share(_misses(case, name) for case in some if name in case)
                    for name in _OTHERS
                },
            }
        )
    if not cases:
        return rows, promises
    promised = [case for case in cases if case["kind"] not in _BEYOND]
    exact = [case for case in cases if case["kind"] == "exact"]
    bars = [
        suite.at_most(
            f"leakage, {len(cases):,} cases: wrong widths called certain",
            sum(map(_violates, cases)),
            0,
        ),
        suite.at_most(
            f"leakage, {len(cases):,} cases: directions above the floor missed",
            sum(row.get("missed above floor", 0) for row in rows),
            0,
        ),
        suite.at_least(
            f"leakage, {len(promised):,} cases: intervals that hold the width",
            _share(map(_holds, promised)) or 0.0,
            0.95,
        ),
        suite.at_least(
            "leakage: exact rows, n >= 1.1 h, called certain",
            _share(case["certain"] for case in exact) or 0.0,
            0.95,
        ),
    ]
    if len(promised) >= 500:  # Of a few cases the median is one of them.
        bars.append(
            suite.at_most(
                "leakage: median interval / h, an open one without end",
                float(np.median([_length(case) for case in promised])),
                0.05,
            )
        )
    return rows, promises + bars


def _more(cases: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    rows, bars = [], []
    for kind, error in _MORE.items():
        some = [case for case in cases if case["kind"] == kind]
        wrong = [case for case in some if case["violates"]]
        for name in dict.fromkeys(case["api"] for case in some):
            ours = [case for case in some if case["api"] == name]
            rows.append(
                {
                    "area": "leakage",
                    "kind": f"{kind}: {name}",
                    "cases": len(ours),
                    "violations": sum(case["violates"] for case in ours),
                    "closed": _share(case["closed"] for case in ours),
                }
            )
        if some:
            # The most that the stated confidence lets pass, by a binomial test at 5 %.
            most = int(scipy.stats.binom.ppf(0.95, len(some), error)) if error else 0
            about = f", e.g. {wrong[0]['api']}, {wrong[0]['about']}" if wrong else ""
            name = f"leakage, {kind}, {len(some):,} cases: false intervals or rows{about}"
            bars.append(suite.at_most(name, len(wrong), most))
    return rows, bars


def _share(flags: Any) -> float | None:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def _holds(case: dict[str, Any]) -> bool:
    return case["lower"] <= case["h"] <= (math.inf if case["upper"] is None else case["upper"])


def _violates(case: dict[str, Any]) -> bool:
    return case["certain"] and case["estimate"] != case["h"]


def _misses(case: dict[str, Any], name: str) -> bool:
    """Whether a width was said that is not the right one; of noise none is said, or zero."""
    return case[name] is not None and case[name] != case["h"]


def _length(case: dict[str, Any]) -> float:
    return (
        math.inf if case["upper"] is None else (case["upper"] - case["lower"]) / max(1, case["h"])
    )


def _worst(outside: list[dict[str, Any]]) -> str | None:
    if not outside:
        return None
    case = max(outside, key=lambda case: max(case["lower"] - case["h"], case["h"] - case["lower"]))
    return (
        f"h = {case['h']}, n = {case['n']}, noise {case['noise']:.2g}: "
        f"{case['lower']} to {case['upper'] or 'any'}"
    )
