"""Branch and bound on small graphs: how many are proven, and how far general solvers are off.

    python -m experiments.benchmark small_gromov_wasserstein

``random``: Gram matrices of 256 Gaussian rows. ``rank`` and ``token``: those of
`gromov_wasserstein` at 256 positions drawn from its text, as z-scores and probabilities. A case is
proven where the bounds are within 2e-6 of each other; the search ends after 60 seconds. ``POT``
(best of 10 starts) and ``ott`` (entropic, epsilon annealed to 0.01) solve the first few cases of
each row; ``worse`` is the share of them that is more than 0.1 % above our lower bound. ``gap of
third`` is that of `certificate` with ``bounds='third'`` beside the same upper bound.
"""

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import gromov_wasserstein as general
from experiments.shared import suite
from logitjax import transport
from logitjax.commands import gw

_SECONDS, _POSITIONS, _PEER_CASES = 60.0, 256, 10
_LOGITS = ("rank, z-scores", "rank, probabilities", "token, z-scores", "token, probabilities")
# Nodes, cases.
_RANDOM, _REAL = ((12, 200), (20, 4), (30, 4)), ((16, 50), (30, 2))
# Beyond what can be proven, to show the gap that z-scores reach.
_WIDE = ((48, 1), (128, 1))


def run(options: suite.Options) -> suite.Result:
    plan = [("random", n, count) for n, count in (((6, 2),) if options.smoke else _RANDOM)]
    statistics = None
    if not options.smoke:
        plan += [(family, n, count) for n, count in _REAL for family in _LOGITS]
        plan += [(_LOGITS[2], n, count) for n, count in _WIDE]
        statistics = general.real_statistics(512)
    rows: list[dict[str, Any]] = []
    for family, n, count in plan:
        items = [
            solved(*graphs, peers=case < _PEER_CASES)
            for case, graphs in enumerate(cases(family, n, count, statistics))
        ]
        rows.append({"graph": family, "n": n, "cases": count} | summary(items))
        print(rows[-1], flush=True)
    bars = []
    for name, some in (
        ("random graphs, n = 12", [row for row in rows if row["n"] == 12]),
        ("logit graphs, n = 16", [row for row in rows if row["n"] == 16]),
    ):
        if some:
            share = sum(row["proven"] * row["cases"] for row in some)
            share /= sum(row["cases"] for row in some)
            bars.append(suite.at_least(f"{name}: share proven in 60 s", share, 0.95))
    return suite.Result(rows=rows, bars=bars)


def cases(
    family: str, n: int, count: int, statistics: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two matrices a case, in units of the second one's root mean square."""
    for seed in range(count):
        rng = np.random.default_rng((n, seed))
        if family == "random":
            z, w = rng.normal(size=(2, _POSITIONS, n))
            c, d = z.T @ z, w.T @ w
        else:
            kind, _, scale = family.partition(", ")
            transform = general.standardized if scale == "z-scores" else general.probabilities
            count_all = len(statistics["teacher"].values)
            take = np.sort(rng.choice(count_all, _POSITIONS, replace=False))
            some = {
                name: jax.tree.map(lambda x, take=take: np.asarray(x)[take], s)
                for name, s in statistics.items()
            }
            if kind == "token":
                pair = general.token_pair(family, n, some, transform)
                c, d = general.matrix(pair.c), general.matrix(pair.d)
            else:
                x, y = (
                    np.asarray(transform(some[side])[:, :n], np.float64)
                    for side in ("student", "teacher")
                )
                c, d = x.T @ x, y.T @ y
        unit = np.sqrt(np.square(d).mean())
        yield c / unit, d / unit


def solved(c: np.ndarray, d: np.ndarray, *, peers: bool) -> dict[str, Any]:
    """Bounds and seconds of one case, and other solvers' values over our lower bound."""
    start = time.perf_counter()
    answer = transport.branch_and_bound(c, d, seconds=_SECONDS)
    case: dict[str, Any] = {"seconds": time.perf_counter() - start}
    case["gap"] = float(answer.upper) / float(answer.lower)
    if peers:
        factors = [transport.FactoredGraph(general.small_factor(matrix)) for matrix in (c, d)]
        third = transport.certificate(*factors, bounds="third", scale="none")
        case["gap of third"] = float(answer.upper) / float(third.lower)
        if importlib.util.find_spec("ot"):
            pair = general.Pair("", len(c), *factors)
            case["POT"] = general.pot(pair, *factors, starts=10)["value"] / float(answer.lower)
        _, cost, reason = gw.entropic_gw(c, d, max_iterations=30)
        case["ott"] = np.nan if reason else cost / float(answer.lower)
    return case


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "proven": float(np.mean([case["gap"] <= 1 + 2.1e-6 for case in records]))
    }
    for name in ("seconds", "gap"):
        values = [case[name] for case in records]
        row |= {name: float(np.median(values)), f"{name}, 95 %": float(np.quantile(values, 0.95))}
    row["gap of third"] = float(np.median([x["gap of third"] for x in records if len(x) > 2]))
    for name in ("POT", "ott"):
        ratios = np.array([case[name] for case in records if name in case])
        if len(ratios):
            row |= {f"{name} / lower": float(np.nanmedian(ratios))}
            row |= {f"{name} worse": float(np.mean(~(ratios <= 1.001)))}
    return row
