"""Certificates of many pairs of graphs at once, without a program for each size."""

import collections
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from logitjax.ops import checks
from logitjax.transport._answer import Certificate, in_float32
from logitjax.transport._certificate import certificate
from logitjax.transport._graph import FactoredGraph, Graph, num_nodes, parts
from logitjax.transport._rounding import UNDERFLOW
from logitjax.transport._sorted import Coupling

# Entries processed together: as many as fit a core's cache.
_ENTRIES = 1 << 15


def certificate_many(pairs: Sequence[tuple[Graph, Graph]], **options: Any) -> Certificate:
    """Bound many pairs of graphs: `certificate` with a leading axis of pairs.

    With ``bounds='cheap'``, no ``refine`` and unscaled or jointly scaled units, pairs of graphs
    with equally many nodes are bounded together in float64 by numpy: nothing is compiled, however
    many sizes there are. Other pairs go to `certificate` one by one, with one program per size.

    Args:
        pairs: graphs c and d of known numbers, as for `certificate`.
        options: those of `certificate` that all pairs share; no candidates.

    Returns:
        A `Certificate` with a leading axis ``[pairs]``. Couplings are padded with masses of zero.

    Raises:
        ValueError: there is no pair, or an error of `certificate`.

    >>> c = np.eye(3)
    >>> print(certificate_many([(c, 3 * c), (c, c)], scale="none").upper)
    [1.3333334 0.       ]
    """
    if not pairs:
        raise ValueError("pairs: expected at least one pair of graphs, got none")
    p, scale = options.get("p", 2), options.get("scale") or "joint"
    plain = options.get("bounds", "cheap") == "cheap" and options.get("refine") is None
    plain &= set(options) <= {"p", "scale", "bounds", "refine", "key"}
    plain &= p in (1, 2) and scale in ("joint", "none")
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    answers: dict[int, tuple[Any, ...]] = {}
    for i, pair in enumerate(pairs):
        kinds: Any = [_kind(graph) for graph in pair]
        if plain and None not in kinds and kinds[0][1] == kinds[1][1]:
            groups[tuple(kinds)].append(i)
        else:
            one = certificate(*pair, **options)
            plan = one.coupling
            numbers = (one.lower, one.upper, one.units, 0, 0)
            answers[i] = (*numbers, plan.rows, plan.columns, plan.mass)
    for ((_, n), _), members in groups.items():
        size = max(1, _ENTRIES // n**2)
        for start in range(0, len(members), size):
            some = members[start : start + size]
            results = _together([pairs[i] for i in some], p, scale)
            answers |= dict(zip(some, zip(*results, strict=True), strict=True))
    longest = max(len(answer[-1]) for answer in answers.values())
    fields = list(zip(*(answers[i] for i in range(len(pairs))), strict=True))
    lower, upper, units, cost, unit = (np.stack(x) for x in fields[:5])
    plan = [
        np.stack([np.pad(x, (0, longest - len(x))) if len(x) < longest else x for x in column])
        for column in fields[5:]
    ]
    empty = np.zeros((len(pairs), 0), np.float32)
    never = jnp.asarray(empty.astype(bool))
    answer = Certificate(lower, upper, Coupling(*plan), units, empty, jnp.asarray(empty), never)
    return in_float32(answer, (cost, unit[:, None]), scale)


def _kind(graph: Any) -> tuple[Any, int] | None:
    if isinstance(graph, FactoredGraph):
        return (graph.values.shape, num_nodes(graph)) if graph.ids is None else None
    return ("matrix", num_nodes(graph)) if hasattr(graph, "ndim") else None


def _together(pairs: Sequence[tuple[Graph, Graph]], p: int, scale: str) -> tuple[np.ndarray, ...]:
    """The bounds of `certificate` for graphs of one size, and the couplings."""
    sides = [
        _matrices(side, name) for side, name in zip(zip(*pairs, strict=True), "cd", strict=True)
    ]
    factored = all(isinstance(graph, FactoredGraph) for graph in pairs[0])
    rms = [np.sqrt(np.square(x).mean(-1).mean(-1)) for x, _, _ in sides]
    # A graph of zeros has no scale; half an exponent of no number is this low.
    halves = [np.where(r > 0, half, -5_000) for r, (_, half, _) in zip(rms, sides, strict=True)]
    common = np.maximum(*halves)
    common = np.where(common > -5_000, common, 0)
    shifts = [np.minimum(2 * (half - common), 0) for half in halves]
    c, d = (_shifted(x, s) for (x, _, _), s in zip(sides, shifts, strict=True))
    root: Any = sum(np.ldexp(error, s) for (_, _, error), s in zip(sides, shifts, strict=True))
    local, other = _features(c), _features(d)
    lower = _lowered(_moments(local, other, p), root, p)
    n = c.shape[1]
    if factored and p == 2 and n > 1:
        # For Gram matrices a matching is optimal, which sends diagonal to diagonal.
        zeros = np.zeros(c.shape[:2])
        diagonals = [(np.diagonal(x, axis1=1, axis2=2), zeros) for x in (c, d)]
        rest = [_without(f, x) for f, (x, _) in zip((local, other), diagonals, strict=True)]
        value = (
            _distance(diagonals[0], diagonals[1], 2) + (n - 1) * _moments(rest[0], rest[1], 2)
        ) / n
        lower = np.maximum(lower, _lowered(value * (1 - _gamma(0)), root, 2))
    upper, columns = _cheapest(pairs, (c, d), (local, other), root, p)
    joint = scale == "joint"
    # The unit is the reported float32 number.
    unit = np.where(rms[1] > 0, rms[1], 1.0).astype(np.float32) if joint else np.ones(len(pairs))
    half = np.where(rms[1] > 0, halves[1], 0) if joint else 0
    back = unit.astype(np.float64) ** p
    return (
        lower / back * (1 - _gamma(0)),
        upper / back * (1 + _gamma(0)),
        np.stack([unit, unit], 1),
        np.broadcast_to(2 * p * (common - half), unit.shape),
        np.broadcast_to(2 * half, unit.shape),
        np.broadcast_to(np.arange(n, dtype=np.int32), columns.shape),
        columns,
        np.full(columns.shape, 1 / n),
    )


def _matrices(graphs: Sequence[Any], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``[pairs, n, n]`` with entries of about one, halves of their exponents and their errors."""
    values = np.stack([np.asarray(parts(graph)[0], np.float64) for graph in graphs])
    checks.values(values, np.isfinite, name, "finite entries")
    exponents = np.frexp(np.maximum(values.max((1, 2)), -values.min((1, 2))))[1]
    if not isinstance(graphs[0], FactoredGraph):
        half = (exponents + 1) // 2
        return _shifted(values, -2 * half), half, np.zeros(len(values))
    z = _shifted(values, -exponents)
    gram = np.swapaxes(z, 1, 2) @ z
    trace = np.trace(gram, axis1=1, axis2=2) / z.shape[2]
    return gram, exponents, 1.1 * _gamma(z.shape[1]) * trace


def _shifted(values: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    if not exponents.any():
        return values
    # Powers of two that float64 holds: three times as fast.
    if np.abs(exponents).max() < 1000:
        return values * np.ldexp(1.0, exponents)[:, None, None]
    return np.ldexp(values, exponents[:, None, None])


def _gamma(count: int) -> float:
    """As in `logitjax.transport._rounding`, in float64 whatever type JAX computes in."""
    share = (count + 16) * 2.0**-53
    return share / (1 - share)


def _features(x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    k = x.shape[-1]
    mean = x.sum(-1) / k
    x = x - mean[..., None]
    variance = np.einsum("bij,bij->bi", x, x) / k
    rms = np.sqrt(np.square(mean) + variance)
    error = _gamma(2 * k) * rms
    return [(mean, error), (np.sqrt(variance), 2 * error), (rms, 2 * error)]


def _without(features: Any, diagonal: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    (mean, error), _, (rms, _) = features
    k = mean.shape[-1]
    share = k / (k - 1)
    mean = share * (mean - diagonal / k)
    square = np.maximum(share * (np.square(rms) - np.square(diagonal) / k), 0.0)
    variance = np.maximum(square - np.square(mean), 0.0)
    # No term above is larger than k rms^2 / (k - 1), nor a diagonal entry than sqrt(k) rms.
    error = 3 * error
    squared = 8 * share * error * rms
    # A root's error is the square's error divided by it, and at most the root of that error.
    roots = [
        (root, np.minimum(squared / np.maximum(root, 1e-300), np.sqrt(squared)))
        for root in (np.sqrt(variance), np.sqrt(square))
    ]
    return [(mean, share * error), *roots]


def _moments(one: Any, other: Any, p: int) -> np.ndarray:
    distances = [_distance(f, g, p) for f, g in zip(one, other, strict=True)][: 1 if p == 1 else 3]
    if p == 1:
        return distances[0]
    return np.maximum((distances[0] + distances[1]) * (1 - _gamma(0)), distances[2])


def _distance(f: Any, g: Any, p: int) -> np.ndarray:
    """The sorted distance of features, minus their errors and its rounding."""
    apart = np.abs(np.sort(f[0], -1) - np.sort(g[0], -1)) ** p
    # An L_1 norm is at most the L_2 norm.
    root = sum(np.sqrt(np.mean(np.square(e), -1)) for _, e in (f, g)) * (1 + _gamma(apart.shape[1]))
    return _lowered(apart.mean(-1) * (1 - _gamma(2 * apart.shape[1])), root, p)


def _lowered(raw: np.ndarray, root: Any, p: int) -> np.ndarray:
    least = np.maximum(raw - root, 0.0) if p == 1 else np.maximum(np.sqrt(raw) - root, 0.0) ** 2
    return np.maximum(least * (1 - _gamma(0)) - UNDERFLOW, 0.0)


def _cheapest(
    pairs: Sequence[tuple[Graph, Graph]],
    graphs: tuple[np.ndarray, np.ndarray],
    features: Any,
    root: np.ndarray,
    p: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The best coupling that sorts by a feature: an upper bound of its cost, and its columns."""
    c, d = graphs
    count, n, _ = c.shape
    tried = []
    for f, g in zip(*features, strict=True):
        order, other = (np.argsort(-x[0], -1, kind="stable") for x in (f, g))
        columns = np.empty_like(order)
        np.put_along_axis(columns, order, other, -1)
        first = n * (columns + n * np.arange(count)[:, None])
        # No index is out of range, and "clip" is the fastest way to skip the check.
        x = np.take(d, first[:, :, None] + columns[:, None, :], mode="clip")
        np.subtract(c, x, out=x)
        rows = np.abs(x).sum(-1) if p == 1 else np.einsum("bij,bij->bi", x, x)
        most = rows.sum(-1) / n**2 * (1 + _gamma(3 * n)) + UNDERFLOW * rows.any(1)
        tried.append((most, columns))
    costs, every = (np.stack(x) for x in zip(*tried, strict=True))
    best, here = costs.argmin(0), np.arange(count)
    most, columns = costs[best, here], every[best, here]
    for i in np.flatnonzero(most == 0):
        pair = pairs[int(i)]
        x, y = (np.asarray(parts(graph)[0]) for graph in pair)
        # Zero is claimed only of graphs that are equal as given.
        rows: Any = slice(None) if isinstance(pair[0], FactoredGraph) else columns[i][:, None]
        if x.shape != y.shape or not np.array_equal(x, y[rows, columns[i]]):
            most[i] = UNDERFLOW
        else:
            root[i] = 0.0
    upper = most + root if p == 1 else (np.sqrt(most) + root) ** 2
    return upper * (1 + _gamma(8)), columns
